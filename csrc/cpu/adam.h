// What the paths of the Adam(W) step share.
#pragma once

#include <cstdint>

#include "isa.h"
#include "maps.h"

namespace aotrain {

constexpr float kAmaxMin = 1e-12f;
constexpr float kFloat8Max = 448.0f;
constexpr int64_t kMaxBlock = 4096;  // a block is buffered on the stack
constexpr int64_t kUnquantizedBlock = 1024;

enum Format : int32_t { kDynamic8, kDynamic4, kFloat8, kFloat32 };

// One parameter, all fields 64 bits, as aotrain/kernels/_adam_cpu.py packs them; AdamTensors in adam.py explains them.
struct Tensor {
    void* param;
    const void* grad;
    void* m;
    float* m_scale;
    void* v;
    float* v_scale;
    int64_t rows, row_length;
    uint64_t key;
    int64_t first_index, row_stride;
};

// AdamScalars of aotrain/kernels/adam.py, rounded to float32, and what else is common to all parameters of a step.
struct Options {
    float one_minus_beta1, one_minus_beta2, eps, decay_factor, coupled_decay, step_size, inv_sqrt_bias_correction2;
    int32_t maximize, format, param_bf16, grad_bf16, stochastic;
    int64_t block_size;
};

// n elements of a row that share a scale.
struct Block {
    void* param;
    const void* grad;
    void* m;
    float* m_scale;
    void* v;
    float* v_scale;
    int64_t n;
    uint64_t key;
    int64_t index;  // of the first element in the global parameter
};

inline int64_t block_length(const Options& o) { return o.format == kFloat32 ? kUnquantizedBlock : o.block_size; }

inline int64_t blocks_per_row(const Tensor& t, const Options& o) {
    return (t.row_length + block_length(o) - 1) / block_length(o);
}

inline void* advance(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

inline Block block_at(const Tensor& t, const Options& o, int64_t number) {
    const int64_t size = block_length(o), per_row = blocks_per_row(t, o);
    const int64_t row = number / per_row, column = number % per_row * size;
    const int64_t at = row * t.row_length + column, left = t.row_length - column;
    const int64_t code = o.format == kDynamic4   ? row * ((t.row_length + 1) / 2) + column / 2
                         : o.format == kFloat32 ? at * 4
                                                : at;
    return {advance(t.param, at * (o.param_bf16 ? 2 : 4)),
            advance(const_cast<void*>(t.grad), at * (o.grad_bf16 ? 2 : 4)),
            advance(t.m, code),
            t.m_scale + number,
            advance(t.v, code),
            t.v_scale + number,
            left < size ? left : size,
            t.key,
            t.first_index + row * t.row_stride + column};
}

// Steps blocks first..last-1 of a parameter.
using StepRange = void (*)(const Tensor& tensor, const Options& options, int64_t first, int64_t last);

}  // namespace aotrain
