// Weights for the kernels that multiply pairs of bf16. A pair is 32 bits: two channels next to one another for the
// pointwise weights, two taps of one channel for the depthwise ones.
//
//   pointwise   [out_columns / columns][ceil(c_mid / 2)][columns]: (k, k + 1) of one output channel; in backward
//               [mid_columns / columns][ceil(c_out / 2)][columns]: two output channels of one k; by planes
//               [c_out][ceil(c_mid / 2)]
//   depthwise   [group of 32 channels][plan.tap_pairs][low, high][lanes], lanes as depthwise_bf16.inl has its sums:
//               taps of rows 0 and 1, 2 and 3, ... one below the other; of a last single row, neighbours in the row,
//               and a last single tap with zero; so for each plane of taps along the depth
//
//     0 0 0        Kernels of 3 x 3 have five pairs: of each tap of rows 0 and 1 with the one below it (three),
//     0 0 0        of taps 0 and 1 of row 2, and of its tap 2 with zero.
//     1 1 2
#ifndef DSCONV_ISA
#error "pack_bf16.inl belongs inside an ISA region"
#endif

// Panel of output channels as they lie, for forward_planes.inl: dst[output channel][pair]. There is no multiplier.
static void pack_pointwise_pair_rows(const PackContext& ctx, int64_t panel) {
  constexpr int lanes = 2 * Vec<bf16x2>::n;
  const int64_t k = ctx.geom.c_mid, columns = ctx.plan.micro.columns, ld = round_up(k, 2);
  const bf16* const weight = static_cast<const bf16*>(ctx.pw_weight);
  bf16* const dst = static_cast<bf16*>(ctx.packed.pw_forward);
  const int64_t last = (panel + 1) * columns < ctx.geom.c_out ? (panel + 1) * columns : ctx.geom.c_out;
  for (int64_t c = panel * columns; c < last; ++c) {
    for (int64_t i = 0; i < k; i += lanes) {
      const int there = lanes_left(k - i, lanes), room = lanes_left(ld - i, lanes);
      vstore_two(dst + c * ld + i, vload_two(weight + c * k + i, there), room);
    }
  }
}

// Panel of output channels.
static void pack_pointwise_pairs(const PackContext& ctx, int64_t panel) {
  if (ctx.plan.by_planes) return pack_pointwise_pair_rows(ctx, panel);
  constexpr int n = Vec<float>::n;
  const Geometry& g = ctx.geom;
  const int64_t columns = ctx.plan.micro.columns, first = panel * columns, pairs = ceil_div(g.c_mid, 2);
  const bf16* weight = static_cast<const bf16*>(ctx.pw_weight) + first * g.c_mid;
  bf16x2* dst = static_cast<bf16x2*>(ctx.packed.pw_forward) + first * pairs;
  for (int64_t j = 0; j < columns; j += n) {
    const int64_t left = g.c_out - first - j;
    const int channels = left > 0 ? lanes_left(left, n) : 0;
    const bf16* from = weight + j * g.c_mid;
    if (g.multiplier == 1 && g.c_mid % 2 == 0) {
      // The pairs are there: words to be turned, which floats serve for as well as any.
      const float* words = reinterpret_cast<const float*>(from);
      for (int64_t k = 0; k < pairs; k += n) {
        transpose_block(words + k, pairs, channels, lanes_left(pairs - k, n),
                        reinterpret_cast<float*>(dst + k * columns + j), columns);
      }
      continue;
    }
    for (int64_t k = 0; k < pairs; ++k) {
      for (int i = 0; i < n; ++i) {
        uint32_t bits = 0;
        if (i < channels) bits = from[i * g.c_mid + tensor_channel(g, 2 * k)].bits;
        if (i < channels && 2 * k + 1 < g.c_mid) {
          bits |= static_cast<uint32_t>(from[i * g.c_mid + tensor_channel(g, 2 * k + 1)].bits) << 16;
        }
        dst[k * columns + j + i].bits = bits;
      }
    }
  }
}

// Of the pointwise weights the columns from `weight` on, `width` of 32: dst[pair of output channels][column].
static void pair_weight_rows(const Geometry& g, const bf16* weight, int width, bf16x2* dst) {
  constexpr int columns = 2 * Vec<float>::n;
  for (int64_t c = 0; c < g.c_out; c += 2, dst += columns, weight += 2 * g.c_mid) {
    ask_for_row<0>(weight + kReadAhead * g.c_mid, width);
    ask_for_row<0>(weight + (kReadAhead + 1) * g.c_mid, width);
    const __m512i partner = c + 1 < g.c_out ? vload_two(weight + g.c_mid, width) : vzero_two();
    store_pairs(vload_two(weight, width), partner, dst);
  }
}

// Panel of k.
static void pack_pointwise_backward_pairs(const PackContext& ctx, int64_t panel) {
  constexpr int n = Vec<float>::n;
  const Geometry& g = ctx.geom;
  static_assert(kMicroVecs == 2, "a panel is what a vector of bf16 holds");
  const int64_t first = panel * 2 * n, pairs = ceil_div(g.c_out, 2);
  const int width = first < g.c_mid ? lanes_left(g.c_mid - first, 2 * n) : 0;
  bf16x2* dst = static_cast<bf16x2*>(ctx.packed.pw_backward) + first * pairs;
  const bf16* weight = static_cast<const bf16*>(ctx.pw_weight);
  if (g.multiplier == 1) return pair_weight_rows(g, weight + first, width, dst);
  for (int64_t c = 0; c < g.c_out; c += 2, dst += 2 * n, weight += 2 * g.c_mid) {
    const bool partner = c + 1 < g.c_out;
    for (int i = 0; i < 2 * n; ++i) {
      const int64_t k = i < width ? tensor_channel(g, first + i) : 0;
      const uint32_t lower = i < width ? weight[k].bits : 0,
                     upper = i < width && partner ? weight[g.c_mid + k].bits : 0;
      dst[i].bits = lower | upper << 16;
    }
  }
}

// taps[t][channel] for `count` taps and two vectors of channels, those past `channels` zero.
DSCONV_INLINE void turn_taps(const bf16* weight, int64_t taps, int channels, int count,
                             float (&out)[Vec<float>::n][2 * Vec<float>::n]) {
  constexpr int n = Vec<float>::n;
  for (int i = 0; i < 2; ++i) {
    const int left = channels - i * n;
    transpose_block(weight + i * n * taps, taps, left < 0 ? 0 : lanes_left(left, n), count, &out[0][i * n], 2 * n);
  }
}

DSCONV_INLINE bf16x2* store_tap_pair(const float* upper, const float* lower, bf16x2* dst) {
  constexpr int n = Vec<float>::n;
  const __m512i a = vnarrow_two(vload(upper), vload(upper + n));
  const __m512i b = lower != nullptr ? vnarrow_two(vload(lower), vload(lower + n)) : vzero_two();
  vstore(dst, vzip_low(a, b));
  vstore(dst + n, vzip_high(a, b));
  return dst + 2 * n;
}

// The channels of one panel, which are a group.
static void pack_depthwise_pairs(const PackContext& ctx, int64_t panel) {
  constexpr int n = Vec<float>::n;
  const Geometry& g = ctx.geom;
  const CpuPlan& plan = ctx.plan;
  static_assert(kMicroVecs == 2, "a panel is a group");
  const int64_t first = panel * 2 * n;
  const int channels = first < g.c_mid ? lanes_left(g.c_mid - first, 2 * n) : 0;
  const bf16* weight = static_cast<const bf16*>(ctx.dw_weight) + first * plan.taps;
  bf16x2* dst = static_cast<bf16x2*>(ctx.packed.dw_weight) + first * plan.tap_pairs;
  float upper[n][2 * n], lower[n][2 * n];
  for (int64_t row = 0; row < g.kernel_d * g.kernel_h;) {
    const bool two_rows = row % g.kernel_h + 1 < g.kernel_h;
    for (int64_t j = 0; j < g.kernel_w; j += n) {
      const int count = lanes_left(g.kernel_w - j, n);
      const bf16* from = weight + row * g.kernel_w + j;
      turn_taps(from, plan.taps, channels, count, upper);
      if (two_rows) turn_taps(from + g.kernel_w, plan.taps, channels, count, lower);
      for (int t = 0; t < count; t += two_rows ? 1 : 2) {
        const float* other = two_rows ? lower[t] : (t + 1 < count ? upper[t + 1] : nullptr);
        dst = store_tap_pair(upper[t], other, dst);
      }
    }
    row += two_rows ? 2 : 1;
  }
}

static void pack_depthwise_forward_bf16(const PackContext& ctx, int64_t panel) {
  if (ctx.plan.tap_pairs > 0) {
    pack_depthwise_pairs(ctx, panel);
  } else {
    pack_depthwise<bf16, float>(ctx, panel);
  }
}
