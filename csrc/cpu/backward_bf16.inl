// Stage P of backward where both products multiply pairs of bf16: their factors, rounded to bf16 as PyTorch's own
// convolutions round what they save. Sums, the depthwise and what stays within a tile are fp32.
//
//   weight gradient   sums[c_out][k] += g^T . a     pairs of pixels (2 j, 2 j + 1), from two rows of a tile:
//
//                       g  [pixels / 2][c_out]        a  [pixels / 2][columns], each where its tile was, over both rows
//
//   du                = g . pw_weight               pairs of output channels (2 j, 2 j + 1)
//
//                       g  [pixels][c_out / 2]        pw_weight  [c_out / 2][columns]
//
// Where a number has no partner, that is zero, on both sides.
#ifndef DSCONV_ISA
#error "backward_bf16.inl belongs inside an ISA region"
#endif

// g of a tile in both forms: in rows[pixels][out_ld / 2] and, over g itself, pairs of pixels.
static GradTile<bf16x2> pair_gradient(const BackwardContext& ctx, int64_t count, float* g, float* rows) {
  const int64_t c_out = ctx.p.geom.c_out, ld = ctx.plan.out_ld, half = ld / 2;
  bf16x2* const channels = reinterpret_cast<bf16x2*>(rows);
  bf16x2* const pixels = reinterpret_cast<bf16x2*>(g);
  pair_channels(g, ld, count, c_out, channels, half);
  if (ctx.p.grad_pw_weight != nullptr) zip_pixels(g, ld, count, c_out, pixels, 2 * ld);
  return {pixels, kMicroRows, 2 * ld, channels, kMicroRows * half, half, true};
}

// The same for blocks of backward_panels.inl, which has these forms for the compute type.
DSCONV_INLINE void turn_rows(const Geometry& g, float* g_tile, int64_t ld, int count, bf16x2* to, int64_t rows_block) {
  constexpr int n = Vec<bf16x2>::n;
  static_assert(kMicroRows <= n, "a row is one vector");
  bf16x2* const pairs = reinterpret_cast<bf16x2*>(g_tile);
  zip_pixels(g_tile, ld, count, g.c_out, pairs, 2 * ld);
  for (int64_t c = 0; c < g.c_out; c += kMicroRows, to += rows_block) {
    for (int i = 0; i < count; i += 2) vstore(to + i / 2 * n, vload(pairs + i * ld + c));
  }
}
DSCONV_INLINE void turn_pixels(const Geometry& g, const float* g_tile, int64_t ld, int count, float* memory,
                               bf16x2* to) {
  constexpr int n = Vec<float>::n;
  pair_channels(g_tile, ld, count, g.c_out, reinterpret_cast<bf16x2*>(memory), ld);
  // Words to be turned, which floats serve for as well as any.
  const int64_t pairs = ceil_div(g.c_out, 2);
  for (int64_t c = 0; c < pairs; c += n) {
    transpose_block(memory + c, ld, count, lanes_left(pairs - c, n), reinterpret_cast<float*>(to) + c * n, n);
  }
}
DSCONV_INLINE void copy_weight_rows(const Geometry& g, const bf16* from, int64_t width, bf16x2* to) {
  pair_weight_rows(g, from, static_cast<int>(width), to);
}
