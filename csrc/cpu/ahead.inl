// Memory that is wanted soon. A loop of multiply-adds leaves the memory idle: after each of its calls a part of what
// the next tile will read is prefetched into L2, so that a tile waits for its first lines only.
#ifndef DSCONV_ISA
#error "ahead.inl belongs inside an ISA region"
#endif

// What comes from a cache is better read as it is needed where products are few: more than this a call delays them.
constexpr int64_t kMostAtOnce = 4 << 10;

// Some stretches of memory, each in about equal parts.
struct Ahead {
  static constexpr int kMost = 4;
  struct Stretch {
    const char *next, *end;
    int64_t bytes;  // at a time
  };
  Stretch of[kMost];
  int count;
};

DSCONV_INLINE void prefetch_some(Ahead& ahead) {
  for (int i = 0; i < ahead.count; ++i) {
    Ahead::Stretch& s = ahead.of[i];
    const char* const end = s.end - s.next < s.bytes ? s.end : s.next + s.bytes;
    for (; s.next < end; s.next += kCacheLine) __builtin_prefetch(s.next, 0, 2);
  }
}

// Adds [begin, end) in `calls` parts.
template <typename S>
DSCONV_INLINE void add_stretch(Ahead& ahead, const S* begin, const S* end, int64_t calls) {
  if (begin >= end) return;
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(S));
  ahead.of[ahead.count++] = {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end),
                             round_up(ceil_div(bytes, calls), kCacheLine)};
}

// The `count` pixels of an output from `pixel` on, where all its pixels lie in one line.
template <typename S>
DSCONV_INLINE void add_pixels(Ahead& ahead, const S* data, const Strides& s, Layout layout, const Geometry& g,
                              int64_t pixel, int64_t count, int64_t calls) {
  const int64_t pixels = g.n * g.d_out * g.h_out * g.w_out;
  if (data == nullptr || layout != Layout::nhwc || s.h != g.w_out * s.w || s.n != g.d_out * g.h_out * s.h) return;
  if (count > pixels - pixel) count = pixels - pixel;
  add_stretch(ahead, data + pixel * s.w, data + (pixel + count) * s.w, calls);
}

// The rows of x that the `count` pixels from `pixel` on read and those before it do not.
template <typename S>
DSCONV_INLINE void add_rows(Ahead& ahead, const S* x, const Strides& s, const Geometry& g, int64_t pixel, int64_t count,
                            int64_t calls) {
  const int64_t slice_pixels = g.h_out * g.w_out, last = pixel - 1;
  int64_t slice = last / slice_pixels;
  int64_t row = last % slice_pixels / g.w_out * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h + 1;
  if (pixel == (slice + 1) * slice_pixels) ++slice, row = 0;
  const int64_t image = slice / g.d_out;
  // In 3-D on the last slice that is read; those before it have been read for the slice above.
  const int64_t depth = slice % g.d_out * g.stride_d - g.pad_front + (g.kernel_d - 1) * g.dilation_d;
  if (image >= g.n || row < 0 || row >= g.h_in || depth < 0 || depth >= g.d_in) return;
  int64_t rows = ceil_div(count, g.w_out) * g.stride_h;
  if (rows > g.h_in - row) rows = g.h_in - row;
  const S* begin = x + image * s.n + depth * s.d + row * s.h;
  add_stretch(ahead, begin, begin + rows * s.h, calls);
}
