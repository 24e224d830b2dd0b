// The GEMM micro-kernel: C[R x NV * lanes] = or += A[R x k] . B[k x NV * lanes], accumulators in registers.
//
//             B  k rows of NV vectors, ldb apart (a packed panel, or rows of a tile)
//             |
//   A  ---->  C  R rows of NV vectors, ldc apart
//
// A element (i, k) lies at a[i * row_stride + k] where its rows run along k (tiles of pixels), or at
// a[i + k * k_stride] where its columns do (gradients read a tile as its transpose); it is broadcast.
// A step of k costs R broadcasts and NV loads for R * NV FMAs. Of half a vector at the end two rows share a register,
//
//   lower half: a[i] * B[last half]    upper half: a[i + 1] * B[last half]
//
// which costs one FMA for both, and a blend of two broadcasts, which other units do than those that multiply (Zen 5).
// Where a vector is multiplied in two halves anyway, each row has a register of half the width and no blend: measured
// on Zen 4, 24 columns 23.7 in place of 27.5 cycles a step, 8 columns 8.0 in place of 17.0.
//
// B is read in whole vectors. Where C goes is the target's: sums of a tile, or outputs of the layer with bias and clamp
// applied while they are in registers. T may be a pair of 16-bit numbers (bf16x2): then k counts pairs, vfma adds both
// products, and C is fp32.
#ifndef DSCONV_ISA
#error "gemm.inl belongs inside an ISA region"
#endif

// AVX2: a step of 6 rows is short, so what is beside the steps counts, and blocks of fewer rows wait for their
// additions. What follows from it was measured there.
constexpr bool kSixRows = kMicroRows == 6;

template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
};

// Of numbers as they are stored.
template <typename S>
constexpr int kVectorsOfLine = kCacheLine / static_cast<int>(Vec<typename ComputeOf<S>::type>::n * sizeof(S));

// C = or += the sums, whole vectors.
template <typename T>
struct SumTarget {
  T* c;
  int64_t ld;
  bool accumulate;

  inline __attribute__((always_inline)) typename Vec<T>::type start(int64_t, int) const { return vset(T(0)); }
  inline __attribute__((always_inline)) typename Vec<T>::type start_twice(int64_t, int) const { return vset(T(0)); }
  // Another core may have read the partial sums of the call before.
  template <int NV>
  inline __attribute__((always_inline)) void expect(int64_t row) const {
    constexpr int per_line = kVectorsOfLine<T>;
    ask_for_lines(c + row * ld, per_line * Vec<T>::n, (NV + per_line - 1) / per_line);
  }
  template <int NV, typename V>
  inline __attribute__((always_inline)) void take(int64_t row, const V* sums) const {
    T* out = c + row * ld;
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) {
      vstore(out + j * Vec<T>::n, accumulate ? vload(out + j * Vec<T>::n) + sums[j] : sums[j]);
    }
  }
  SumTarget below(int64_t rows) const { return {c + rows * ld, ld, accumulate}; }
};

// What the bias follows: the columns of C where these are output channels, else the rows.
enum class BiasOf { column, row };

// y = clamp(sums + bias), `columns` of them; with `partial` what earlier chains have summed is added first.
template <typename S, typename T, BiasOf Of = BiasOf::column>
struct OutputTarget {
  const T* partial;
  int64_t partial_ld;
  const T* bias;  // of columns: whole vectors
  Clamp<T> clamp;
  S* y;
  int64_t ld, columns;
  bool stream;

  inline __attribute__((always_inline)) typename Vec<T>::type start(int64_t row, int j) const {
    return Of == BiasOf::row ? vset(bias[row]) : vload(bias + j * Vec<T>::n);
  }
  inline __attribute__((always_inline)) typename Vec<T>::type start_twice(int64_t row, int j) const {
    return Of == BiasOf::row ? vset(bias[row]) : vload_twice(bias + j * Vec<T>::n);
  }
  // Lines of y that are not in cache arrive while the sums are made.
  template <int NV>
  inline __attribute__((always_inline)) void expect(int64_t row) const {
    if (stream) return;
    for (int j = 0; j < NV; j += kVectorsOfLine<S>) {
      __builtin_prefetch(y + row * ld + j * Vec<T>::n, 1, 3);
    }
  }
  template <int NV, typename V>
  inline __attribute__((always_inline)) void take(int64_t row, const V* sums) const {
    constexpr int n = Vec<T>::n;
    S* out = y + row * ld;
#if defined(DSCONV_BF16_DOT)
    if (NV == 2 && columns == 2 * n) {
      V v[2];
      DSCONV_UNROLL
      for (int j = 0; j < 2; ++j) {
        v[j] = sums[j < NV ? j : 0];
        if (partial != nullptr) v[j] = vload(partial + row * partial_ld + j * n) + v[j];
        v[j] = vmin(vset(clamp.hi), vmax(vset(clamp.lo), v[j]));
      }
      return stream ? vstream_two(out, v[0], v[1]) : vstore_two(out, v[0], v[1]);
    }
#endif
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) {
      V v = sums[j];
      if (partial != nullptr) v = vload(partial + row * partial_ld + j * n) + v;
      v = vmin(vset(clamp.hi), vmax(vset(clamp.lo), v));
      if (stream) {
        vstream(out + j * n, v);
      } else if ((j + 1) * n <= columns) {
        vstore(out + j * n, v);
      } else {
        vstore(out + j * n, v, static_cast<int>(columns - j * n));
      }
    }
  }
  OutputTarget below(int64_t rows) const {
    OutputTarget t = *this;
    if (partial != nullptr) t.partial += rows * partial_ld;
    if (Of == BiasOf::row) t.bias += rows;
    t.y += rows * ld;
    return t;
  }
};

// Half a vector behind the whole ones: there is none, two rows share a register, or each has its own of half the width.
enum class Half { none, shared, own };

template <typename Sum, int R, Half Of>
struct HalfSums {
  typename Vec<Sum>::type of[(R + 1) / 2];
};
template <typename Sum, int R>
struct HalfSums<Sum, R, Half::own> {
  typename Vec<Sum>::half of[R];
};

// NV vectors, and what Of says.
template <typename T, int R, int NV, Half Of, bool AlongK, int Lines, typename Target>
static __attribute__((noinline)) void micro_kernel(int64_t k, Operand<T> a, Operand<T> b, const Target& target,
                                                   Asked asked) {
  typedef typename ComputeOf<T>::type Sum;
  constexpr int n = Vec<T>::n, kVectors = NV + (Of != Half::none);
  typename Vec<Sum>::type acc[R][NV + 1];
  HalfSums<Sum, R, Of> rest;
  DSCONV_UNROLL
  for (int i = 0; i < R; ++i) {
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = target.start(i, j);
    if constexpr (Of == Half::shared) {
      const typename Vec<Sum>::type first = target.start_twice(i, NV);
      rest.of[i / 2] = i % 2 == 0 ? first : vhalves(rest.of[i / 2], first);
    } else if constexpr (Of == Half::own) {
      rest.of[i] = vhalf(target.start_twice(i, NV));
    }
    target.template expect<kVectors>(i);
  }
  const T* ap = a.data;
  const T* bp = b.data;
  for (int64_t step = 0; step < k; ++step) {
    typename Vec<T>::type bv[NV + 1];
    [[maybe_unused]] typename Vec<T>::type last, lower;
    DSCONV_UNROLL
    for (int line = 0; line < Lines; ++line) __builtin_prefetch(asked.next + line * kCacheLine, 0, 2);
    if constexpr (Lines > 0) asked.next += asked.step;
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = vload(bp + j * n);
    if constexpr (Of != Half::none) last = vload_twice(bp + NV * n);
    DSCONV_UNROLL
    for (int i = 0; i < R; ++i) {
      const T factor = AlongK ? ap[i * a.stride] : ap[i];
      const typename Vec<T>::type av = vset(factor);
      DSCONV_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = vfma(av, bv[j], acc[i][j]);
      if constexpr (Of == Half::shared) {
        if (i % 2 == 0) lower = av;
        if (i % 2 == 1 || i + 1 == R) rest.of[i / 2] = vfma(vhalves(lower, av), last, rest.of[i / 2]);
      } else if constexpr (Of == Half::own) {
        rest.of[i] = vfma(NV > 0 ? vhalf(av) : vset_half(factor), vhalf(last), rest.of[i]);
      }
    }
    ap += AlongK ? 1 : a.stride;
    bp += b.stride;
  }
  // A copy that nothing else can point to: what it says need not be read again after every store.
  const Target out = target;
  DSCONV_UNROLL
  for (int i = 0; i < R; ++i) {
    if constexpr (Of == Half::shared) {
      acc[i][NV] = i % 2 == 0 ? vlower(rest.of[i / 2]) : vupper(rest.of[i / 2]);
    } else if constexpr (Of == Half::own) {
      acc[i][NV] = vwhole(rest.of[i]);
    }
    out.template take<kVectors>(i, acc[i]);
  }
}

// The next smaller of the register blocks that fewer rows are cut into: a half, then 4, 2 and 1, and above that `fine`
// every even number down to 8. Columns of output channels are seldom a multiple of kMicroRows, and a block of less than
// 8 accumulators waits for its additions. Of 6 rows, every number: 5 rows are 5 / 8 of 4 rows and 1.
constexpr int next_micro_rows(int rows, bool fine) {
  if (kSixRows) return rows - 1;
  if (fine && rows > 8) return rows - 2;
  return rows == kMicroRows && rows > 8 ? rows / 2 : (rows > 4 ? (rows > 7 ? 7 : 4) : rows / 2);
}

template <typename T, int NV, Half Of, bool AlongK, int R, typename Target>
static void micro_kernel_rest(int rows, int64_t k, Operand<T> a, Operand<T> b, const Target& target) {
  int done = 0;
  for (; rows - done >= R; done += R) {
    micro_kernel<T, R, NV, Of, AlongK, 0>(k, {a.data + done * (AlongK ? a.stride : 1), a.stride}, b, target.below(done),
                                          {});
  }
  if constexpr (R > 1) {
    const Operand<T> below = {a.data + done * (AlongK ? a.stride : 1), a.stride};
    if (done < rows) {
      constexpr int next = next_micro_rows(R, NV == kMicroVecs || Of != Half::none);
      micro_kernel_rest<T, NV, Of, AlongK, next>(rows - done, k, below, b, target.below(done));
    }
  }
}

template <typename T, int NV, Half Of, bool AlongK, typename Target>
DSCONV_INLINE void micro_kernel_rows(int rows, int64_t k, Operand<T> a, Operand<T> b, const Target& target) {
  if (rows == kMicroRows) {
    micro_kernel<T, kMicroRows, NV, Of, AlongK, 0>(k, a, b, target, {});
  } else {
    constexpr int next = next_micro_rows(kMicroRows, NV == kMicroVecs || Of != Half::none);
    micro_kernel_rest<T, NV, Of, AlongK, next>(rows, k, a, b, target);
  }
}

// Of `left` rows those of the next block: no last one of 1 to 3 behind a full one, which takes as long as one of 4.
constexpr int64_t rows_at_once(int64_t left) {
  if (kSixRows && left > kMicroRows && left < kMicroRows + 4) return (left + 1) / 2;
  return left < kMicroRows ? left : kMicroRows;
}
// The full blocks among those of so many rows.
constexpr int64_t full_blocks(int64_t rows) {
  const int64_t left = rows % kMicroRows;
  return rows / kMicroRows - (kSixRows && rows > kMicroRows && left > 0 && left < 4 ? 1 : 0);
}

// The longest chain of additions in one accumulator: rounding errors grow with it, and one more pass over C is cheap
// where a step is long (128 in place of 256: 1 % of a layer at most; of 6 rows 2.5 %).
constexpr int64_t kLongestChain = kSixRows ? 256 : 128;

DSCONV_INLINE int64_t chains_of(int64_t k) { return k > kLongestChain ? ceil_div(k, kLongestChain) : 1; }

// Whether a block of so many columns is made by the kernel of kMicroVecs vectors. That one has loads to spare between
// its multiply-adds, which narrower ones have not: memory that is wanted soon is asked for among its steps, or between
// the calls of the others.
DSCONV_INLINE bool fills_block(int64_t columns, int lanes) {
  return columns > (kMicroVecs - 1) * lanes + (kHalfVectors ? lanes / 2 : 0);
}

// A block of rows <= kMicroRows, and among its steps what is wanted soon.
template <typename T, int NV, Half Of, bool AlongK, typename Target>
DSCONV_INLINE void micro_kernel_asking(int rows, int64_t k, Operand<T> a, Operand<T> b, const Target& target,
                                       Ahead& ahead) {
  if (rows < kMicroRows || ahead.at == ahead.count) {
    return micro_kernel_rows<T, NV, Of, AlongK>(rows, k, a, b, target);
  }
  if (ahead.of[ahead.at].length < ahead.bytes) {  // of many short runs, some before each call
    prefetch_some(ahead);
    return micro_kernel<T, kMicroRows, NV, Of, AlongK, 0>(k, a, b, target, {});
  }
  const Asked asked = ask(ahead, k);
  if (asked.step <= kCacheLine) return micro_kernel<T, kMicroRows, NV, Of, AlongK, 1>(k, a, b, target, asked);
  if (asked.step <= 2 * kCacheLine) return micro_kernel<T, kMicroRows, NV, Of, AlongK, 2>(k, a, b, target, asked);
  return micro_kernel<T, kMicroRows, NV, Of, AlongK, 4>(k, a, b, target, asked);
}

// The same of NV vectors and a half, where these have halves.
template <typename T, int NV, bool AlongK, typename Target>
DSCONV_INLINE void half_kernel_asking(int rows, int64_t k, Operand<T> a, Operand<T> b, const Target& target,
                                      Ahead& ahead) {
  if constexpr (kHalfVectors) {
    if (multiplies_by_halves()) return micro_kernel_asking<T, NV, Half::own, AlongK>(rows, k, a, b, target, ahead);
    micro_kernel_asking<T, NV, Half::shared, AlongK>(rows, k, a, b, target, ahead);
  }
}

// The chain number `chain` of `chains` of a block of rows <= kMicroRows and columns <= kMicroVecs vectors.
template <typename T, bool AlongK, typename Target>
DSCONV_INLINE void gemm_chain(int64_t chain, int64_t chains, int64_t rows, int64_t columns, int64_t k, Operand<T> a,
                              Operand<T> b, const Target& target, Ahead& ahead) {
  const int64_t begin = k * chain / chains, steps = k * (chain + 1) / chains - begin;
  const Operand<T> a_part = {a.data + begin * (AlongK ? 1 : a.stride), a.stride};
  const Operand<T> b_part = {b.data + begin * b.stride, b.stride};
  const int r = static_cast<int>(rows);
  constexpr int n = Vec<T>::n;
  if (fills_block(columns, n)) {
    micro_kernel_asking<T, kMicroVecs, Half::none, AlongK>(r, steps, a_part, b_part, target, ahead);
  } else if (kHalfVectors && columns <= n / 2) {
    half_kernel_asking<T, 0, AlongK>(r, steps, a_part, b_part, target, ahead);
  } else if (columns <= n) {
    micro_kernel_asking<T, 1, Half::none, AlongK>(r, steps, a_part, b_part, target, ahead);
  } else {
    half_kernel_asking<T, 1, AlongK>(r, steps, a_part, b_part, target, ahead);
  }
}

// C[rows] = or += A . B for rows <= kMicroRows, the columns of A along k.
template <typename T>
DSCONV_INLINE void add_gemm_block(int64_t rows, int64_t columns, int64_t k, Operand<T> a, Operand<T> b,
                                  typename ComputeOf<T>::type* c, int64_t ldc, bool accumulate, Ahead& ahead) {
  const int64_t chains = chains_of(k);
  for (int64_t chain = 0; chain < chains; ++chain) {
    const SumTarget<typename ComputeOf<T>::type> target = {c, ldc, accumulate || chain > 0};
    gemm_chain<T, false>(chain, chains, rows, columns, k, a, b, target, ahead);
  }
}

DSCONV_INLINE int lanes_left(int64_t left, int lanes) { return static_cast<int>(left < lanes ? left : lanes); }

// One chain for all rows of a tile and one panel.
template <typename T, typename Target>
DSCONV_INLINE void gemm_chain_rows(int64_t chain, int64_t chains, int64_t rows, int64_t columns, int64_t k,
                                   Operand<T> a, Operand<T> b, const Target& target, Ahead& ahead) {
  for (int64_t i = 0, block; i < rows; i += block) {
    block = rows_at_once(rows - i);
    gemm_chain<T, true>(chain, chains, block, columns, k, {a.data + i * a.stride, a.stride}, b, target.below(i), ahead);
  }
}

// C = A . B for all rows of a tile and one panel. Chains outermost: a chain's part of the panel, 16 KiB at most, meets
// every block of rows while it is near.
template <typename T>
DSCONV_INLINE void gemm_panel(int64_t rows, int64_t columns, int64_t k, Operand<T> a, Operand<T> b,
                              typename ComputeOf<T>::type* c, int64_t ldc, Ahead& ahead) {
  const int64_t chains = chains_of(k);
  for (int64_t chain = 0; chain < chains; ++chain) {
    const SumTarget<typename ComputeOf<T>::type> target = {c, ldc, chain > 0};
    gemm_chain_rows(chain, chains, rows, columns, k, a, b, target, ahead);
  }
}

// The same into outputs; `sums` [rows][micro columns] holds what chains before the last one have summed.
template <typename S, typename T, typename F, BiasOf Of>
DSCONV_INLINE void gemm_panel_outputs(int64_t rows, int64_t columns, int64_t k, Operand<F> a, Operand<F> b, T* sums,
                                      OutputTarget<S, T, Of> target, Ahead& ahead) {
  constexpr int64_t ld = kMicroVecs * Vec<T>::n;
  const int64_t last = chains_of(k) - 1;
  for (int64_t chain = 0; chain < last; ++chain) {
    gemm_chain_rows(chain, last + 1, rows, columns, k, a, b, SumTarget<T>{sums, ld, chain > 0}, ahead);
  }
  target.partial = last > 0 ? sums : nullptr;
  target.partial_ld = ld;
  gemm_chain_rows(last, last + 1, rows, columns, k, a, b, target, ahead);
}
