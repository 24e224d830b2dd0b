// Memory that is wanted soon. A loop of multiply-adds leaves the memory idle: among its steps, or after each of its
// calls, a part of what the next tile will read is prefetched into L2, so that a tile waits for its first lines only.
#ifndef DSCONV_ISA
#error "ahead.inl belongs inside an ISA region"
#endif

// What a step of a GEMM asks for at most. What comes from a cache is better read as it is needed where this would not
// do.
constexpr int64_t kMostAtOnce = 4 * kCacheLine;

// Some stretches of memory, of which every call asks for `bytes`, or where that is not 0, every step of a call for
// `step`. Evenly: a core drops what it is asked for while it waits for as many lines as it can.
struct Ahead {
  static constexpr int kMost = 4;
  // Runs of `length` bytes, `step` from one to the next: what is left of one of them, and `more` behind it.
  struct Stretch {
    const char *next, *end;
    int64_t length, step, more;
  };
  Stretch of[kMost];
  int count, at;
  int64_t bytes, step;
};

DSCONV_INLINE void skip_finished(Ahead& ahead) {
  Ahead::Stretch& s = ahead.of[ahead.at];
  if (s.next < s.end) return;
  if (s.more == 0) {
    ++ahead.at;
    return;
  }
  --s.more;
  s.end += s.step;
  s.next = s.end - s.length;
}

// What one call of a GEMM asks for: at each of its steps `step` bytes.
struct Asked {
  const char* next;
  int64_t step;
};

DSCONV_INLINE Asked ask(Ahead& ahead, int64_t steps) {
  Ahead::Stretch& s = ahead.of[ahead.at];
  const int64_t left = s.end - s.next;
  const int64_t bytes = ahead.step > 0 ? ahead.step * steps : ahead.bytes;
  int64_t step = ceil_div(left < bytes ? left : bytes, steps);
  if (step > kMostAtOnce) step = kMostAtOnce;
  const Asked asked = {s.next, step};
  s.next += step * steps;
  skip_finished(ahead);
  return asked;
}

// The same at once.
DSCONV_INLINE void prefetch_some(Ahead& ahead) {
  for (int64_t left = ahead.bytes; left > 0 && ahead.at < ahead.count;) {
    Ahead::Stretch& s = ahead.of[ahead.at];
    const int64_t bytes = s.end - s.next < left ? s.end - s.next : left;
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(s.next + i, 0, 2);
    s.next += bytes;
    left -= bytes;
    skip_finished(ahead);
  }
}

// [p, end) now, by loads, some lines at a time: the prefetchers of the hardware follow these, and have more lines under
// way than a core may ask for.
DSCONV_INLINE void read_through(const char* p, const char* end) {
  constexpr int64_t line = kCacheLine;
  for (; end - p > 3 * line; p += 4 * line) {
    const char a = p[0], b = p[line], c = p[2 * line], d = p[3 * line];
    __asm__ volatile("" : : "r"(a), "r"(b), "r"(c), "r"(d));
  }
  for (; p < end; p += line) {
    const char a = *p;
    __asm__ volatile("" : : "r"(a));
  }
}

DSCONV_INLINE int64_t all_bytes(const Ahead& ahead) {
  int64_t bytes = 0;
  for (int i = 0; i < ahead.count; ++i) bytes += ahead.of[i].length * (ahead.of[i].more + 1);
  return bytes;
}

// The call in which a stretch ends goes no further.
DSCONV_INLINE void share_out(Ahead& ahead, int64_t calls) {
  ahead.bytes = ceil_div(all_bytes(ahead), calls > ahead.count ? calls - ahead.count : 1);
}

// [begin, end), and as much of each of `runs` - 1 stretches `step` elements from one to the next.
template <typename S>
DSCONV_INLINE void add_stretch(Ahead& ahead, const S* begin, const S* end, int64_t runs = 1, int64_t step = 0) {
  constexpr int64_t size = static_cast<int64_t>(sizeof(S));
  if (begin >= end) return;
  ahead.of[ahead.count++] = {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end),
                             (end - begin) * size, step * size, runs - 1};
}

// The pixels `of` an output, where all its pixels lie in one line.
template <typename S>
DSCONV_INLINE void add_pixels(Ahead& ahead, const S* data, const Strides& s, Layout layout, const Geometry& g,
                              const Range& of) {
  if (data == nullptr || layout != Layout::nhwc || s.h != g.w_out * s.w || s.n != g.d_out * g.h_out * s.h) return;
  add_stretch(ahead, data + of.begin * s.w, data + of.end * s.w);
}

// The rows of x that these pixels read and those before them do not, in nchw of every channel. Before them: the pixels
// above, or along the depth those of the same rows on the slice before.
template <typename S>
DSCONV_INLINE void add_rows(Ahead& ahead, const S* x, const Strides& s, Layout layout, const Geometry& g,
                            const Range& pixels, bool along_depth) {
  const int64_t slice_pixels = g.h_out * g.w_out, slice = pixels.begin / slice_pixels, image = slice / g.d_out;
  const int64_t oh = pixels.begin % slice_pixels / g.w_out, reach = (g.kernel_h - 1) * g.dilation_h + 1;
  int64_t row = oh * g.stride_h - g.pad_top, rows = ceil_div(pixels.end - pixels.begin, g.w_out) * g.stride_h;
  if (along_depth) {
    rows += reach - g.stride_h;
  } else if (pixels.begin % slice_pixels == 0) {
    row = 0;
  } else {
    row = (pixels.begin - 1) % slice_pixels / g.w_out * g.stride_h - g.pad_top + reach;
  }
  if (along_depth && row < 0) rows += row, row = 0;
  // In 3-D on the last slice that is read; those before it have been read for the slice above.
  const int64_t depth = slice % g.d_out * g.stride_d - g.pad_front + (g.kernel_d - 1) * g.dilation_d;
  if (row < 0 || row >= g.h_in || depth < 0 || depth >= g.d_in) return;
  if (rows > g.h_in - row) rows = g.h_in - row;
  const S* begin = x + image * s.n + depth * s.d + row * s.h;
  if (layout == Layout::nhwc) {
    add_stretch(ahead, begin, begin + rows * s.h);
  } else {
    add_stretch(ahead, begin, begin + rows * s.h, g.c_in, s.c);
  }
}

template <typename S>
DSCONV_INLINE const S* last_pixel(const Geometry& g, const S* x, const Strides& s) {
  return x + (g.n - 1) * s.n + (g.d_in - 1) * s.d + (g.h_in - 1) * s.h + (g.w_in - 1) * s.w;
}

// For a pass whose work is little beside what it reads of an nhwc x: the rows that the tile after `tile` reads, in
// parts for so many calls of this one's; but where these could not take them along, this one's are read now, and there
// is nothing to ask.
template <typename S>
DSCONV_INLINE Ahead rows_of_tile(const CpuPlan& plan, const S* x, const Strides& s, const Geometry& g, int64_t tile,
                                 int64_t calls) {
  const bool now = plan.beyond_cache && g.stride_h * g.stride_w > 2;
  const int64_t which = now ? tile : tile + 1;
  Ahead ahead = {};
  if (which == plan.tiles) return ahead;
  add_rows(ahead, x, s, Layout::nhwc, g, tile_range(plan.order, which), walks_depth(plan.order));
  if (!now) {
    share_out(ahead, calls);
    return ahead;
  }
  // Behind the last row there may be nothing, where rows of x lie further apart than they are long.
  const char* const end = reinterpret_cast<const char*>(last_pixel(g, x, s) + g.c_in);
  const Ahead::Stretch& rows = ahead.of[0];
  if (ahead.count > 0) read_through(rows.next, rows.end < end ? rows.end : end);
  return {};
}

// The next address, which the compiler may not derive from the first: it would keep one pointer a column, on the stack.
template <typename P>
DSCONV_INLINE void advance(P*& p, int64_t step) {
  p += step;
  __asm__("" : "+r"(p));
}

// Asks for the lines of `count` pixels that will be written.
template <typename M>
DSCONV_INLINE void ask_for_lines(M* p, int64_t step, int count) {
  DSCONV_UNROLL
  for (int i = 0; i < count; ++i) {
    __builtin_prefetch(p, 1, 3);
    advance(p, step);
  }
}

// While vector number `vector` of P pixels is made, which are written from `first` on, `step` apart: lines of the next
// P pixels, as many with each vector. Where pixels are dense that is in order through all of them, else this vector's
// part of each: lines in their order come faster. Measured, grad_x of 96 channels from L3: 0.8 of the time.
template <int P, typename T>
DSCONV_INLINE void ask_for_next(T* first, int64_t vector, int64_t channels, int64_t step) {
  constexpr int64_t n = Vec<T>::n;
  const bool dense = step == channels;
  ask_for_lines(first + P * step + vector * n * (dense ? P : 1), dense ? n : step, P);
}

// A panel's part of the rows of the pointwise weights lies a row apart, which no prefetcher follows.
constexpr int64_t kReadAhead = 32, kWriteAhead = 6;
template <int Write, typename S>
DSCONV_INLINE void ask_for_row(const S* p, int64_t width) {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < width; i += line) __builtin_prefetch(p + i, Write, Write ? 3 : 2);
}
