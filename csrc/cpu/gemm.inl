// The GEMM micro-kernel: C[R x NV * lanes] = or += A[R x k] . B[k x NV * lanes], accumulators in registers.
//
//             B  k rows of NV vectors, ldb apart (a packed panel, or rows of a tile)
//             |
//   A  ---->  C  R rows of NV vectors, ldc apart
//
// A element (i, k) lies at a[i * row_stride + k] where its rows run along k (tiles of pixels), or at
// a[i + k * k_stride] where its columns do (gradients read a tile as its transpose); it is broadcast.
// A step of k costs R broadcasts and NV loads for R * NV FMAs. B is read and C written in whole vectors.
#ifndef DSCONV_ISA
#error "gemm.inl belongs inside an ISA region"
#endif

template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
};

template <typename T, int R, int NV, bool AlongK>
static void micro_kernel(int64_t k, Operand<T> a, Operand<T> b, T* c, int64_t ldc, bool accumulate) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V acc[R][NV];
  DSCONV_UNROLL
  for (int i = 0; i < R; ++i) {
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = vset(T(0));
  }
  const T* ap = a.data;
  const T* bp = b.data;
  for (int64_t step = 0; step < k; ++step) {
    V bv[NV];
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = vload(bp + j * n);
    DSCONV_UNROLL
    for (int i = 0; i < R; ++i) {
      const V av = vset(AlongK ? ap[i * a.stride] : ap[i]);
      DSCONV_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = vfma(av, bv[j], acc[i][j]);
    }
    ap += AlongK ? 1 : a.stride;
    bp += b.stride;
  }
  DSCONV_UNROLL
  for (int i = 0; i < R; ++i) {
    DSCONV_UNROLL
    for (int j = 0; j < NV; ++j) {
      T* out = c + i * ldc + j * n;
      vstore(out, accumulate ? vload(out) + acc[i][j] : acc[i][j]);
    }
  }
}

template <typename T, int NV, bool AlongK, int R = kMicroRows>
static void micro_kernel_rows(int rows, int64_t k, Operand<T> a, Operand<T> b, T* c, int64_t ldc, bool accumulate) {
  if (rows == R) {
    micro_kernel<T, R, NV, AlongK>(k, a, b, c, ldc, accumulate);
  } else if constexpr (R > 1) {
    micro_kernel_rows<T, NV, AlongK, R - 1>(rows, k, a, b, c, ldc, accumulate);
  }
}

// The longest chain of additions in one accumulator: rounding errors grow with it, and one more pass over C is cheap.
constexpr int64_t kLongestChain = 256;

// The chain number `chain` of `chains` of a block of rows <= kMicroRows and columns <= kMicroVecs vectors.
template <typename T, bool AlongK>
DSCONV_INLINE void gemm_chain(int64_t chain, int64_t chains, int64_t rows, int64_t columns, int64_t k, Operand<T> a,
                              Operand<T> b, T* c, int64_t ldc, bool accumulate) {
  const int64_t begin = k * chain / chains, steps = k * (chain + 1) / chains - begin;
  const Operand<T> a_part = {a.data + begin * (AlongK ? 1 : a.stride), a.stride};
  const Operand<T> b_part = {b.data + begin * b.stride, b.stride};
  const int r = static_cast<int>(rows);
  if (columns > Vec<T>::n) {
    micro_kernel_rows<T, kMicroVecs, AlongK>(r, steps, a_part, b_part, c, ldc, accumulate || chain > 0);
  } else {
    micro_kernel_rows<T, 1, AlongK>(r, steps, a_part, b_part, c, ldc, accumulate || chain > 0);
  }
}

DSCONV_INLINE int64_t chains_of(int64_t k) { return k > kLongestChain ? ceil_div(k, kLongestChain) : 1; }

// C[rows] += A . B for rows <= kMicroRows, the columns of A along k.
template <typename T>
DSCONV_INLINE void add_gemm_block(int64_t rows, int64_t columns, int64_t k, Operand<T> a, Operand<T> b, T* c,
                                  int64_t ldc) {
  const int64_t chains = chains_of(k);
  for (int64_t chain = 0; chain < chains; ++chain) {
    gemm_chain<T, false>(chain, chains, rows, columns, k, a, b, c, ldc, true);
  }
}

DSCONV_INLINE int lanes_left(int64_t left, int lanes) { return static_cast<int>(left < lanes ? left : lanes); }

// C = A . B for all rows of a tile and one panel. Chains outermost: a chain's part of the panel, 16 KiB of floats at
// most, meets every block of rows while it is in L1.
template <typename T>
DSCONV_INLINE void gemm_panel(int64_t rows, int64_t columns, int64_t k, Operand<T> a, Operand<T> b, T* c, int64_t ldc) {
  const int64_t chains = chains_of(k);
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (int64_t i = 0; i < rows; i += kMicroRows) {
      gemm_chain<T, true>(chain, chains, lanes_left(rows - i, kMicroRows), columns, k,
                          {a.data + i * a.stride, a.stride}, b, c + i * ldc, ldc, false);
    }
  }
}
