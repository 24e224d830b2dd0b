// oneDNN as a peer, from its C++ interface: the two convolutions as primitives in the layouts that it chooses itself,
// x, y and the weights included. Compiled and called by onednn.py; knows nothing of torch.
//
// A step is a list of primitives over memory that exists already. Where two of them want a tensor in different layouts,
// a reorder stands in the list and counts; what goes in and the weights are reordered before.

#include <omp.h>

#include <cstdint>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using dnnl::memory;
using Dims = memory::dims;
using Tag = memory::format_tag;
using Type = memory::data_type;

struct Sizes {
  int64_t n, c, h, w, c_mid, c_out, h_out, w_out, kernel_h, kernel_w, stride, dilation, pad_h, pad_w;
  int64_t bf16, training, relu6, out_relu6;
};

struct Pair {
  Pair(const Sizes& sizes, const float* const* values, const float* dy);

  void run() {
    for (auto& [primitive, arguments] : steps) primitive.execute(stream, arguments);
    stream.wait();
  }

  // Result `index` as plain fp32.
  void result(int index, float* target) {
    memory& from = results.at(index);
    const Dims dims = from.get_desc().dims();
    const Tag plain[] = {Tag::a, Tag::abcd, Tag::abcde};
    memory to({dims, Type::f32, plain[dims.size() == 1 ? 0 : dims.size() - 3]}, engine, target);
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
  }

 private:
  using Arguments = std::unordered_map<int, memory>;

  struct Convolution {
    memory::desc x, weight, bias, y;
    Dims strides, dilations, padding;
    dnnl::primitive_attr attributes;
    dnnl::convolution_forward::primitive_desc forward;
  };

  memory::desc any(const Dims& dims) const { return {dims, type, Tag::any}; }

  Convolution convolution(const Dims& x, const Dims& weight, const Dims& y, int64_t stride, int64_t dilation,
                          Dims padding, bool relu6) const {
    const memory::desc bias({y[1]}, Type::f32, Tag::a);
    Convolution c{any(x), any(weight), bias, any(y), {stride, stride}, {dilation - 1, dilation - 1}, padding, {}, {}};
    dnnl::post_ops after;
#if DNNL_VERSION_MAJOR >= 3
    if (relu6) after.append_eltwise(dnnl::algorithm::eltwise_clip, 0, 6);
#else
    if (relu6) after.append_eltwise(1, dnnl::algorithm::eltwise_clip, 0, 6);
#endif
    c.attributes.set_post_ops(after);
    const auto kind = training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    c.forward =
        descriptor<dnnl::convolution_forward>(c.attributes, kind, dnnl::algorithm::convolution_direct, c.x, c.weight,
                                              c.bias, c.y, c.strides, c.dilations, c.padding, c.padding);
    return c;
  }

  // Of a primitive: since version 3 the descriptor takes the operation's arguments itself.
  template <class Primitive, class... Operation>
  typename Primitive::primitive_desc descriptor(const dnnl::primitive_attr& attributes,
                                                const Operation&... operation) const {
#if DNNL_VERSION_MAJOR >= 3
    return {engine, operation..., attributes};
#else
    return {typename Primitive::desc(operation...), attributes, engine};
#endif
  }

  template <class Primitive, class... Operation>
  typename Primitive::primitive_desc gradient(const dnnl::convolution_forward::primitive_desc& forward,
                                              const Operation&... operation) const {
#if DNNL_VERSION_MAJOR >= 3
    return {engine, operation..., forward};
#else
    return {typename Primitive::desc(operation...), engine, forward};
#endif
  }

  // `from` in another layout, if it has not got it; made now, or as a step.
  memory as(memory from, const memory::desc& wanted, bool step) {
    if (from.get_desc() == wanted) return from;
    memory to(wanted, engine);
    if (step) {
      steps.push_back({dnnl::reorder(from, to), {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}}});
    } else {
      dnnl::reorder(from, to).execute(stream, from, to);
      stream.wait();
    }
    return to;
  }

  memory plain(const Dims& dims, Tag tag, const float* values) const {
    return memory({dims, Type::f32, tag}, engine, const_cast<float*>(values));
  }

  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  Type type;
  bool training;
  std::vector<std::pair<dnnl::primitive, Arguments>> steps;
  std::vector<memory> results;
};

Pair::Pair(const Sizes& s, const float* const* values, const float* dy_values)
    : type(s.bf16 ? Type::bf16 : Type::f32), training(s.training) {
  const Dims x_dims = {s.n, s.c, s.h, s.w}, z_dims = {s.n, s.c_mid, s.h_out, s.w_out};
  const Dims y_dims = {s.n, s.c_out, s.h_out, s.w_out};
  const Dims dw_dims = {s.c, s.c_mid / s.c, 1, s.kernel_h, s.kernel_w}, pw_dims = {s.c_out, s.c_mid, 1, 1};

  const Convolution dw = convolution(x_dims, dw_dims, z_dims, s.stride, s.dilation, {s.pad_h, s.pad_w}, s.relu6);
  const Convolution pw = convolution(z_dims, pw_dims, y_dims, 1, 1, {0, 0}, s.out_relu6);

  memory x_plain = plain(x_dims, Tag::nchw, values[0]);
  memory dw_weight_plain = plain(dw_dims, Tag::goihw, values[1]),
         pw_weight_plain = plain(pw_dims, Tag::oihw, values[3]);
  memory x = as(x_plain, dw.forward.src_desc(), false);
  memory dw_bias(dw.bias, engine), pw_bias(pw.bias, engine);
  memory dw_bias_plain = plain({s.c_mid}, Tag::a, values[2]), pw_bias_plain = plain({s.c_out}, Tag::a, values[4]);
  dnnl::reorder(dw_bias_plain, dw_bias).execute(stream, dw_bias_plain, dw_bias);
  dnnl::reorder(pw_bias_plain, pw_bias).execute(stream, pw_bias_plain, pw_bias);
  stream.wait();

  memory z(dw.forward.dst_desc(), engine), y(pw.forward.dst_desc(), engine);
  steps.push_back({dnnl::convolution_forward(dw.forward),
                   {{DNNL_ARG_SRC, x},
                    {DNNL_ARG_WEIGHTS, as(dw_weight_plain, dw.forward.weights_desc(), false)},
                    {DNNL_ARG_BIAS, dw_bias},
                    {DNNL_ARG_DST, z}}});
  memory pw_src = as(z, pw.forward.src_desc(), true);
  steps.push_back({dnnl::convolution_forward(pw.forward),
                   {{DNNL_ARG_SRC, pw_src},
                    {DNNL_ARG_WEIGHTS, as(pw_weight_plain, pw.forward.weights_desc(), false)},
                    {DNNL_ARG_BIAS, pw_bias},
                    {DNNL_ARG_DST, y}}});
  results = {y};
  if (!training) return;

  // dy arrives in the layout of y. Returns {gradient of what went in, of the weight, of the bias}.
  const auto backward = [&](const Convolution& c, memory src, memory weight_plain, memory dst_grad) {
    const auto algorithm = dnnl::algorithm::convolution_direct;
    const auto data = gradient<dnnl::convolution_backward_data>(c.forward, algorithm, c.x, c.weight, c.y, c.strides,
                                                                c.dilations, c.padding, c.padding);
    const auto weights = gradient<dnnl::convolution_backward_weights>(c.forward, algorithm, c.x, c.weight, c.bias, c.y,
                                                                      c.strides, c.dilations, c.padding, c.padding);
    memory src_grad(data.diff_src_desc(), engine), weight_grad(weights.diff_weights_desc(), engine);
    memory bias_grad(weights.diff_bias_desc(), engine);
    memory for_data = as(dst_grad, data.diff_dst_desc(), true);
    steps.push_back({dnnl::convolution_backward_data(data),
                     {{DNNL_ARG_DIFF_DST, for_data},
                      {DNNL_ARG_WEIGHTS, as(weight_plain, data.weights_desc(), false)},
                      {DNNL_ARG_DIFF_SRC, src_grad}}});
    memory for_weights = as(dst_grad, weights.diff_dst_desc(), true), seen = as(src, weights.src_desc(), true);
    steps.push_back({dnnl::convolution_backward_weights(weights),
                     {{DNNL_ARG_DIFF_DST, for_weights},
                      {DNNL_ARG_SRC, seen},
                      {DNNL_ARG_DIFF_WEIGHTS, weight_grad},
                      {DNNL_ARG_DIFF_BIAS, bias_grad}}});
    return std::vector<memory>{src_grad, weight_grad, bias_grad};
  };
  memory dy = as(plain(y_dims, Tag::nchw, dy_values), pw.forward.dst_desc(), false);
  const std::vector<memory> of_pw = backward(pw, z, pw_weight_plain, dy);
  const std::vector<memory> of_dw = backward(dw, x, dw_weight_plain, of_pw[0]);
  results.insert(results.end(), {of_dw[0], of_dw[1], of_dw[2], of_pw[1], of_pw[2]});
}

std::string last_error;

}  // namespace

extern "C" {

// The values stay the caller's and have to outlive the pair. Null where oneDNN cannot do it; last_error() tells why.
void* pair_create(const Sizes* sizes, const float* const* values, const float* dy) {
  try {
    return new Pair(*sizes, values, dy);
  } catch (const dnnl::error& error) {
    last_error = error.what();
    return nullptr;
  }
}
const char* pair_error() { return last_error.c_str(); }
void pair_run(void* pair) { static_cast<Pair*>(pair)->run(); }
void pair_result(void* pair, int index, float* target) { static_cast<Pair*>(pair)->result(index, target); }
void pair_free(void* pair) { delete static_cast<Pair*>(pair); }
void use_threads(int threads) { omp_set_num_threads(threads); }
const char* version() {
  static const std::string text = [] {
    const dnnl_version_t* v = dnnl_version();
    return std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
  }();
  return text.c_str();
}

}  // extern "C"
