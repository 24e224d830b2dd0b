// The kernel table of one ISA, and the order in which the kernel bodies build on one another.
#ifndef DSCONV_ISA
#error "table.inl belongs inside an ISA region"
#endif

template <typename S>
DSCONV_INLINE DTypeKernels kernels_of() {
  typedef typename ComputeOf<S>::type T;
  DTypeKernels k;
  k.bytes = {sizeof(S), sizeof(T), sizeof(T)};
  k.widest_by_planes = kWidestByPlanes<S>;
  k.pack_depthwise = pack_depthwise<S, T>;
  k.pack_depthwise_forward = pack_depthwise<S, T>;
  k.pack_biases = pack_biases<S, T>;
  k.pack_pointwise_forward = pack_pointwise_forward<S, T>;
  k.pack_pointwise_backward = pack_pointwise_backward<S, T>;
  k.forward = forward<S, T, T>;
  k.forward_moments = forward_moments<S, T, T>;
  k.backward_group = backward_group<S, T, T>;
  k.reduce_pointwise = reduce_pointwise<S, T>;
  k.reduce_biases = reduce_biases<S, T>;
  k.backward_turn_x = backward_turn_x<S, T>;
  k.backward_x = backward_x<S, T>;
  k.backward_dw = backward_dw<S, T>;
  k.reduce_depthwise = reduce_depthwise<S, T>;
  k.backward_turn = backward_turn<S, T, T>;
  k.backward_panel = backward_panel<S, T, T>;
  k.depthwise_moments = depthwise_moments<S, T>;
  k.depthwise_sums = depthwise_sums_of_images<S, T>;
  k.gate_gradients = gate_gradients<S, T>;
  k.norm_moments = norm_moments<S, T>;
  k.norm_forward = norm_forward<S, T>;
  k.norm_sums = norm_sums<S, T>;
  k.norm_backward = norm_backward<S, T>;
  k.backward_norm_group = backward_norm_group<S, T>;
  return k;
}

template <typename T>
DSCONV_INLINE MicroTile micro_tile() {
  MicroTile tile = {kMicroRows, kMicroVecs * Vec<T>::n, Vec<T>::n};
  return tile;
}

#if !defined(DSCONV_BF16_DOT)
static void fill_table(KernelTable& table) {
  table.micro_f32 = micro_tile<float>();
  table.micro_f64 = micro_tile<double>();
  table.by_dtype[static_cast<int>(DType::f32)] = kernels_of<float>();
  table.by_dtype[static_cast<int>(DType::f64)] = kernels_of<double>();
  table.by_dtype[static_cast<int>(DType::f16)] = kernels_of<f16>();
  table.by_dtype[static_cast<int>(DType::bf16)] = kernels_of<bf16>();
}
#endif
