// bf16 between tensors and tiles where both are bf16: blocks of 32 x 32 turn as pairs of rows, in words. And tiles of
// fp32 as the pairs of bf16 that are multiplied.
#ifndef DSCONV_ISA
#error "tile_io_bf16.inl belongs inside an ISA region"
#endif

// dst[c * dst_ld + r] = src[r * src_ld + c] for c < columns <= 32 and r < rows <= 32; Whole: and zeros for the other r.
//
// Zipping rows 2 j and 2 j + 1 makes words of two rows' numbers, for half of the columns at a time: 0 - 3, 8 - 11, ...,
// and 4 - 7, 12 - 15, ... Sixteen such vectors turn as floats do.
template <bool Whole>
static void turn_block(const bf16* src, int64_t src_ld, int rows, int columns, bf16* dst, int64_t dst_ld) {
  constexpr int n = Vec<float>::n;
  const bool full = rows == 2 * n && columns == 2 * n;
  for (int upper = 0; upper < 2; ++upper) {
    __m512 v[n];
    DSCONV_UNROLL
    for (int j = 0; j < n; ++j) {
      const bf16* p = src + 2 * j * src_ld;
      const __m512i a = full ? vload_two(p) : (2 * j < rows ? vload_two(p, columns) : vzero_two());
      const __m512i b =
          full ? vload_two(p + src_ld) : (2 * j + 1 < rows ? vload_two(p + src_ld, columns) : vzero_two());
      v[j] = _mm512_castsi512_ps(upper != 0 ? vzip_high(a, b) : vzip_low(a, b));
    }
    vtranspose(v);
    DSCONV_UNROLL
    for (int i = 0; i < n; ++i) {
      const int c = i / 4 * 8 + 4 * upper + i % 4;
      if (!full && c >= columns) continue;
      const __m512i out = _mm512_castps_si512(v[i]);
      if (Whole || full) {
        vstore(reinterpret_cast<bf16x2*>(dst + c * dst_ld), out);
      } else {
        vstore_two(dst + c * dst_ld, out, rows);
      }
    }
  }
}

// Rows of bf16 outputs, ld apart, to the planes of an nchw tensor [n][total_channels][image].
static void store_planes(const bf16* rows, int64_t ld, int64_t channel, int64_t channels, int64_t pixel, int64_t count,
                         bf16* dst, int64_t total_channels, int64_t image) {
  constexpr int lanes = 2 * Vec<float>::n;
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, 1, image, true);
    bf16* to = dst + (run.slice * total_channels + channel) * image + run.ow;
    for (int64_t i = 0; i < run.length; i += lanes) {
      turn_block<false>(rows + (p + i) * ld, ld, lanes_left(run.length - i, lanes), static_cast<int>(channels), to + i,
                        image);
    }
    p += run.length;
  }
}

// 32 pairs (a, b) in the order of the numbers.
DSCONV_INLINE void store_pairs(__m512i a, __m512i b, bf16x2* to) {
  constexpr int n = Vec<bf16x2>::n;
  a = vin_zip_order(a), b = vin_zip_order(b);
  vstore(to, vzip_low(a, b));
  vstore(to + n, vzip_high(a, b));
}

// Rows 2 j and 2 j + 1 of src[rows][ld] become row j of to[rows / 2][to_ld], pair by pair; columns are rounded up to
// 32. `to` may be src with to_ld = 2 * ld.
static void zip_pixels(const float* src, int64_t ld, int64_t rows, int64_t columns, bf16x2* to, int64_t to_ld) {
  constexpr int n = Vec<float>::n;
  for (int64_t i = 0; i < rows; i += 2, src += 2 * ld, to += to_ld) {
    for (int64_t c = 0; c < columns; c += 2 * n) {
      const __m512i a = vnarrow_two(vload(src + c), vload(src + c + n));
      const __m512i b = i + 1 < rows ? vnarrow_two(vload(src + ld + c), vload(src + ld + c + n)) : vzero_two();
      store_pairs(a, b, to + c);
    }
  }
}

// Rows of c_out numbers as pairs of neighbours.
static void pair_channels(const float* src, int64_t ld, int64_t rows, int64_t c_out, bf16x2* to, int64_t to_ld) {
  constexpr int n = Vec<float>::n;
  for (int64_t i = 0; i < rows; ++i, src += ld, to += to_ld) {
    bf16* const numbers = reinterpret_cast<bf16*>(to);
    for (int64_t c = 0; c < c_out; c += 2 * n) vstore_two(numbers + c, vload(src + c), vload(src + c + n));
    if (c_out % 2 != 0) numbers[c_out].bits = 0;
  }
}
