// One Adam(W) step of many parameters in one pass: decode both moments, update, encode both, write back.
//
// Bit for bit what aotrain/optim/step.py and aotrain/optim/state.py compute: float32, one rounding per operation in
// the same order, square root and division correctly rounded. Compile with -ffp-contract=off. The only fused
// multiply-adds are explicit, in the AVX-512 codecs, where they are exact or an error bound guards them.
//
// C ABI, no torch headers: one build serves every torch version.
#include "adam.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#define AOTRAIN_PORTABLE "adam_portable.h"
#include "portable_isas.h"
#if AOTRAIN_X86
#include "adam_avx512.h"
#endif

namespace aotrain {
namespace {

// A thread takes this many blocks at a time; fewer cost more than they save.
constexpr int64_t kBlocksPerUnit = 128;

StepRange select(int isa, const Options& options) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::select(options);
    if (isa == kAvx2) return avx2::step_range;
#endif
    (void)isa, (void)options;
    return scalar::step_range;
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_adam_isa() { return aotrain::best_isa(); }

int64_t aotrain_adam_max_block() { return aotrain::kMaxBlock; }

// Steps `count` parameters; `isa` must be one that the CPU has.
void aotrain_adam(const aotrain::Tensor* tensors, int64_t count, const aotrain::Options* options, int isa,
                  int threads) {
    using namespace aotrain;
    const StepRange step = select(isa, *options);
    std::vector<int64_t> blocks(count), first_unit(count + 1, 0);
    for (int64_t i = 0; i < count; i++) {
        blocks[i] = tensors[i].rows * blocks_per_row(tensors[i], *options);
        first_unit[i + 1] = first_unit[i] + (blocks[i] + kBlocksPerUnit - 1) / kBlocksPerUnit;
    }
    const int64_t units = first_unit[count];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t i = std::upper_bound(first_unit.begin(), first_unit.end(), unit) - first_unit.begin() - 1;
        const int64_t first = (unit - first_unit[i]) * kBlocksPerUnit;
        step(tensors[i], *options, first, std::min(first + kBlocksPerUnit, blocks[i]));
    }
}
}
