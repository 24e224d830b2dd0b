// Weights into the compute type and the order the kernels walk them.
#ifndef DSCONV_ISA
#error "pack.inl belongs inside an ISA region"
#endif

// Channel of the tensors for the kernels' channel k (cpu_plan.h).
DSCONV_INLINE int64_t tensor_channel(const Geometry& g, int64_t k) { return k % g.c_in * g.multiplier + k / g.c_in; }

// The channels k of one panel: dst[tap][k] = dw_weight[channel of k][tap].
template <typename S, typename T>
static void pack_depthwise(const PackContext& ctx, int64_t panel) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.geom;
  const CpuPlan& plan = ctx.plan;
  const S* weight = static_cast<const S*>(ctx.dw_weight);
  T* dst = static_cast<T*>(ctx.packed.dw_weight);
  const int64_t first = panel * plan.micro.columns, last = first + plan.micro.columns;
  for (int64_t k = first; k < last; k += n) {
    const int channels = k < g.c_mid ? lanes_left(g.c_mid - k, n) : 0;
    for (int64_t tap = 0; g.multiplier == 1 && tap < plan.taps; tap += n) {
      transpose_block(weight + k * plan.taps + tap, plan.taps, channels, lanes_left(plan.taps - tap, n),
                      dst + tap * plan.mid_columns + k, plan.mid_columns);
    }
    for (int64_t tap = 0; g.multiplier > 1 && tap < plan.taps; ++tap) {
      for (int i = 0; i < n; ++i) {
        const T value = i < channels ? widen_one(weight + tensor_channel(g, k + i) * plan.taps + tap) : T(0);
        dst[tap * plan.mid_columns + k + i] = value;
      }
    }
  }
}

template <typename S, typename T>
static void pack_biases(const PackContext& ctx) {
  const Geometry& g = ctx.geom;
  const CpuPlan& plan = ctx.plan;
  const S* dw_bias = static_cast<const S*>(ctx.dw_bias);
  T* bias = static_cast<T*>(ctx.packed.dw_bias);
  for (int64_t k = 0; k < plan.mid_columns; ++k) {
    bias[k] = dw_bias != nullptr && k < g.c_mid ? widen_one(dw_bias + tensor_channel(g, k)) : T(0);
  }
  if (ctx.packed.pw_bias == nullptr) return;
  const S* pw_bias = static_cast<const S*>(ctx.pw_bias);
  bias = static_cast<T*>(ctx.packed.pw_bias);
  for (int64_t c = 0; c < plan.out_columns; ++c) {
    bias[c] = pw_bias != nullptr && c < g.c_out ? widen_one(pw_bias + c) : T(0);
  }
}

// The same as they lie, for forward_planes.inl: dst[output channel][k]. There is no multiplier.
template <typename S, typename T>
static void pack_pointwise_rows(const PackContext& ctx, int64_t panel) {
  constexpr int n = Vec<T>::n;
  const int64_t k = ctx.geom.c_mid, columns = ctx.plan.micro.columns;
  const int64_t begin = panel * columns * k, end = clamp64(ctx.geom.c_out - panel * columns, 0, columns) * k + begin;
  const S* const weight = static_cast<const S*>(ctx.pw_weight);
  T* const dst = static_cast<T*>(ctx.packed.pw_forward);
  for (int64_t i = begin; i < end; i += n) {
    const int lanes = lanes_left(end - i, n);
    vstore(dst + i, vload(weight + i, lanes), lanes);
  }
}

// Panel of output channels: dst[k][column] = pw_weight[first + column][k].
template <typename S, typename T>
static void pack_pointwise_forward(const PackContext& ctx, int64_t panel) {
  if (ctx.plan.by_planes) return pack_pointwise_rows<S, T>(ctx, panel);
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.geom;
  const int64_t columns = ctx.plan.micro.columns, first = panel * columns;
  const S* weight = static_cast<const S*>(ctx.pw_weight) + first * g.c_mid;
  T* dst = static_cast<T*>(ctx.packed.pw_forward) + first * g.c_mid;
  for (int64_t j = 0; j < columns; j += n) {
    const int64_t left = g.c_out - first - j;
    const int channels = left > 0 ? lanes_left(left, n) : 0;
    const S* from = weight + j * g.c_mid;
    if (g.multiplier == 1) {
      for (int64_t k = 0; k < g.c_mid; k += n) {
        transpose_block(from + k, g.c_mid, channels, lanes_left(g.c_mid - k, n), dst + k * columns + j, columns);
      }
    } else {
      for (int64_t k = 0; k < g.c_mid; ++k) {
        const int64_t channel = tensor_channel(g, k);
        for (int i = 0; i < n; ++i) {
          dst[k * columns + j + i] = i < channels ? widen_one(from + i * g.c_mid + channel) : T(0);
        }
      }
    }
  }
}

// Panel of k: dst[out channel][column] = pw_weight[out channel][first + column].
template <typename S, typename T>
static void pack_pointwise_backward(const PackContext& ctx, int64_t panel) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.geom;
  const int64_t columns = ctx.plan.micro.columns, first = panel * columns;
  const S* weight = static_cast<const S*>(ctx.pw_weight);
  T* dst = static_cast<T*>(ctx.packed.pw_backward) + first * g.c_out;
  for (int64_t c = 0; c < g.c_out; ++c, dst += columns, weight += g.c_mid) {
    ask_for_row<0>(weight + kReadAhead * g.c_mid + first, columns);
    for (int64_t j = 0; j < columns; j += n) {
      const int64_t k = first + j;
      if (k >= g.c_mid) {
        vstore(dst + j, vset(T(0)));
      } else if (g.multiplier == 1) {
        vstore(dst + j, vload(weight + k, lanes_left(g.c_mid - k, n)));
      } else {
        for (int i = 0; i < n; ++i) {
          dst[j + i] = k + i < g.c_mid ? widen_one(weight + tensor_channel(g, k + i)) : T(0);
        }
      }
    }
  }
}
