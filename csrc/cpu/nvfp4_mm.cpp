// Decode an operand of an emulated NVFP4 product to bfloat16 or float32, where data * scale is exact.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include <algorithm>
#include <cstdint>

#include "isa.h"

#define AOTRAIN_PORTABLE "nvfp4_mm_portable.h"
#include "portable_isas.h"
#if AOTRAIN_X86
#include "nvfp4_mm_avx512.h"
#endif

namespace aotrain {
namespace {

constexpr int64_t kUnitBlocks = 2048;  // a thread takes as many at a time

auto select(int isa) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::decode_nvfp4;
    if (isa == kAvx2) return avx2::decode_nvfp4;
#endif
    (void)isa;
    return scalar::decode_nvfp4;
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_nvfp4_mm_isa() { return aotrain::best_isa(); }

// 16 values per block of 8 bytes of data and one of scale; `isa` must be one that the CPU has.
void aotrain_nvfp4_decode(const uint8_t* data, const uint8_t* scale, int64_t blocks, int bf16, void* to, int isa,
                          int threads) {
    using namespace aotrain;
    const auto decode = select(isa);
    const int64_t units = (blocks + kUnitBlocks - 1) / kUnitBlocks, item = bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t first = unit * kUnitBlocks;
        decode(data + 8 * first, scale + first, std::min(kUnitBlocks, blocks - first), bf16 != 0,
               static_cast<char*>(to) + 16 * first * item);
    }
}
}
