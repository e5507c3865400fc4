// What the paths of the 8-bit Adam(W) step share.
#pragma once

#include <cstdint>

#include "dynamic_map.h"

namespace aotrain {

constexpr int kScalar = 0, kAvx512 = 1;
constexpr int64_t kMaxBlock = 4096;  // a block's moments are buffered on the stack

extern const Map<true> kSigned;
extern const Map<false> kUnsigned;

// AdamScalars of aotrain/optim/step.py, rounded to float32.
struct Scalars {
    float one_minus_beta1, one_minus_beta2, eps, decay_factor, coupled_decay, step_size, inv_sqrt_bias_correction2;
    int32_t maximize;
};

struct State {
    uint8_t* m_codes;
    float* m_scale;
    uint8_t* v_codes;
    float* v_scale;
};

struct Shape {
    int64_t rows, row_length, block_size;
};

// n elements that share a scale. P and G are float, or uint16_t for bfloat16.
template <typename P, typename G>
struct Block {
    P* param;
    const G* grad;
    uint8_t* m_codes;
    float* m_scale;
    uint8_t* v_codes;
    float* v_scale;
    int64_t n;
};

template <bool Signed>
void encode_scalar(const float* x, uint8_t* codes, float scale, int64_t n);

template <typename P, typename G>
void step_block_avx512(const Block<P, G>& block, const Scalars& s);

}  // namespace aotrain
