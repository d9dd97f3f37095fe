// The table of callables that this object offers, one of each kernel for each number format.

#include "activation.h"
#include "attention.h"
#include "binding.h"
#include "draw.h"
#include "linear.h"
#include "norm.h"
#include "recurrent.h"
#include "rope.h"

using namespace llmfw;

#define LLMFW_KERNEL(name, ...) {name, call<__VA_ARGS__>, 0x80, nullptr}
#define LLMFW_KERNELS(T)                                                      \
  LLMFW_KERNEL("linear_" #T, &linear<T>),                                     \
      LLMFW_KERNEL("grouped_linear_" #T, &grouped_linear<T>),                 \
      LLMFW_KERNEL("head_linear_" #T, &head_linear<T>),                       \
      LLMFW_KERNEL("rms_norm_" #T, &rms_norm<T>),                             \
      LLMFW_KERNEL("add_rms_norm_" #T, &add_rms_norm<T>),                     \
      LLMFW_KERNEL("silu_and_mul_" #T, &act_and_mul<T, Silu>),                \
      LLMFW_KERNEL("gelu_and_mul_" #T, &act_and_mul<T, Gelu>),                \
      LLMFW_KERNEL("gelu_tanh_and_mul_" #T, &act_and_mul<T, GeluTanh>),       \
      LLMFW_KERNEL("rope_and_cache_" #T, &rope_and_cache<T>),                 \
      LLMFW_KERNEL("latent_rope_and_cache_" #T, &latent_rope_and_cache<T>),   \
      LLMFW_KERNEL("paged_attention_" #T, &paged_attention<T>),               \
      LLMFW_KERNEL("causal_conv1d_" #T, &causal_conv1d<T>),                   \
      LLMFW_KERNEL("selective_scan_" #T, &selective_scan<T>),                 \
      LLMFW_KERNEL("ssd_scan_" #T, &ssd_scan<T>),                             \
      LLMFW_KERNEL("draw_tokens_" #T, &draw_tokens<T>)

extern "C" {
extern MethodDef llmfw_methods[];
MethodDef llmfw_methods[] = {
    LLMFW_KERNELS(float),
    LLMFW_KERNELS(bf16),
    LLMFW_KERNELS(fp16),
    {nullptr, nullptr, 0, nullptr},
};
}
