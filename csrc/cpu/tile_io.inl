// Between activation tensors and tiles. A tile is pixel-major in the compute type: dst[p * ld + channel] for `count`
// output pixels from flat index `pixel` (n, od, oh, ow in order). nchw data turn in registers, lanes x lanes at a time.
#ifndef DSCONV_ISA
#error "tile_io.inl belongs inside an ISA region"
#endif

// The longest stretch from `pixel` that is contiguous along w: a row, or a slice where rows follow one another. Slice
// number n * depth + od; in 2-D an image is one slice.
struct PixelRun {
  int64_t slice, oh, ow, length;
};
DSCONV_INLINE PixelRun run_at(int64_t pixel, int64_t limit, int64_t h, int64_t w, bool rows_joined) {
  const int64_t slice = h * w, in_slice = pixel % slice;
  PixelRun r;
  r.slice = pixel / slice;
  r.oh = in_slice / w;
  r.ow = in_slice % w;
  const int64_t left = rows_joined ? slice - in_slice : w - r.ow;
  r.length = left < limit ? left : limit;
  return r;
}

// dst[r * dst_ld + c] = src[c * src_ld + r] for r < rows <= lanes, c < columns <= lanes. Writes whole vectors.
template <typename S, typename M>
DSCONV_INLINE void transpose_block(const S* src, int64_t src_ld, int columns, int rows, M* dst, int64_t dst_ld) {
  typedef typename ComputeOf<M>::type T;
  constexpr int n = Vec<T>::n;
  typename Vec<T>::type v[n];
  if (columns == n && rows == n) {
    DSCONV_UNROLL
    for (int i = 0; i < n; ++i) v[i] = vload(src + i * src_ld);
    vtranspose(v);
    DSCONV_UNROLL
    for (int i = 0; i < n; ++i) vstore(dst + i * dst_ld, v[i]);
    return;
  }
  for (int i = 0; i < n; ++i) v[i] = i < columns ? vload(src + i * src_ld, rows) : vset(T(0));
  vtranspose(v);
  for (int i = 0; i < rows; ++i) vstore(dst + i * dst_ld, v[i]);
}

// The same with whole `dst` rows stored to S and `columns` of them at most: dst is a tensor. stream: whole rows, which
// are lines, go past the caches.
template <typename S, typename T>
DSCONV_INLINE void transpose_block_out(const T* src, int64_t src_ld, int columns, int rows, S* dst, int64_t dst_ld,
                                       bool stream) {
  constexpr int n = Vec<T>::n;
  typename Vec<T>::type v[n];
  for (int i = 0; i < n; ++i) v[i] = i < columns ? vload(src + i * src_ld) : vset(T(0));
  vtranspose(v);
  for (int i = 0; i < rows; ++i) {
    if (columns < n) {
      vstore(dst + i * dst_ld, v[i], columns);
    } else if (stream) {
      vstream(dst + i * dst_ld, v[i]);
    } else {
      vstore(dst + i * dst_ld, v[i]);
    }
  }
}

// One element, from and to storage.
template <typename S>
DSCONV_INLINE auto widen_one(const S* p) {
  return vload(p, 1)[0];
}
DSCONV_INLINE float widen_one(const float* p) { return *p; }
DSCONV_INLINE double widen_one(const double* p) { return *p; }
template <typename S, typename T>
DSCONV_INLINE void store_one(T value, S* p) {
  vstore(p, vset(value), 1);
}
DSCONV_INLINE void store_one(float value, float* p) { *p = value; }
DSCONV_INLINE void store_one(double value, double* p) { *p = value; }

// Whole vectors: count rounded up to them is written.
template <typename T>
static void zero_fill(T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec<T>::n) vstore(p + i, vset(T(0)));
}

template <typename S, typename T>
DSCONV_INLINE void copy_row(const S* src, T* dst, int64_t count) {
  constexpr int n = Vec<T>::n;
  int64_t i = 0;
  for (; i + n <= count; i += n) vstore(dst + i, vload(src + i));
  if (i < count) vstore(dst + i, vload(src + i, static_cast<int>(count - i)));
}
template <typename S, typename T>
DSCONV_INLINE void store_row(const T* src, S* dst, int64_t count) {
  constexpr int n = Vec<T>::n;
  int64_t i = 0;
  for (; i + n <= count; i += n) vstore(dst + i, vload(src + i));
  if (i < count) vstore(dst + i, vload(src + i), static_cast<int>(count - i));
}

// far: from planes that no cache holds; of the next ones as much is asked for, since their stretches are short for the
// prefetchers.
template <typename S, typename T>
static void load_tile(const S* src, const Strides& stride, Layout layout, int64_t d, int64_t h, int64_t w,
                      int64_t channels, int64_t pixel, int64_t count, T* dst, int64_t ld, bool far = false) {
  constexpr int n = Vec<T>::n;
  const bool joined = stride.h == w * stride.w;
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, h, w, joined);
    const S* from = src + run.slice / d * stride.n + run.slice % d * stride.d + run.oh * stride.h + run.ow * stride.w;
    T* to = dst + p * ld;
    if (layout == Layout::nhwc) {
      for (int64_t i = 0; i < run.length; ++i) copy_row(from + i * stride.w, to + i * ld, channels);
    } else {
      for (int64_t c = 0; c < channels; c += n) {
        const int columns = lanes_left(channels - c, n), next = far ? lanes_left(channels - c - n, n) : 0;
        for (int64_t i = 0; i < run.length; i += n) {
          const S* ahead = from + (c + n) * stride.c + i;
          for (int k = 0; k < next; ++k, ahead += stride.c) __builtin_prefetch(ahead, 0, 2);
          transpose_block(from + c * stride.c + i, stride.c, columns, lanes_left(run.length - i, n), to + i * ld + c,
                          ld);
        }
      }
    }
    p += run.length;
  }
}

// To a dense tensor [n, total_channels, image] in either layout, channels from `channel` on. Reads whole vectors. far:
// to planes that no cache holds, whose whole lines are written without being read first.
template <typename S, typename T>
static void store_tile(const T* src, int64_t ld, int64_t channel, int64_t channels, int64_t pixel, int64_t count,
                       S* dst, Layout layout, int64_t total_channels, int64_t image, bool far = false) {
  constexpr int n = Vec<T>::n, size = static_cast<int>(sizeof(S));
  const bool stream = far && n * size == kCacheLine && image % n == 0;
  if (layout == Layout::nhwc) {
    for (int64_t p = 0; p < count; ++p) store_row(src + p * ld, dst + (pixel + p) * total_channels + channel, channels);
    return;
  }
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, 1, image, true);
    S* to = dst + (run.slice * total_channels + channel) * image + run.ow;
    for (int64_t c = 0; c < channels; c += n) {
      const int rows = lanes_left(channels - c, n);
      S* const plane = to + c * image;
      const int begun = stream ? static_cast<int>(reinterpret_cast<uint64_t>(plane) % kCacheLine) / size : 0;
      for (int64_t i = 0; i < run.length;) {
        const int columns = lanes_left(run.length - i, i == 0 ? n - begun : n);
        transpose_block_out(src + (p + i) * ld + c, ld, columns, rows, plane + i, image, stream);
        i += columns;
      }
    }
    p += run.length;
  }
  if (stream) vstream_fence();
}
