// Quantize an operand of an NVFP4 product: bit for bit the definition in aotrain/kernels/nvfp4_cast.py.
//
// One pass finds the largest magnitude, of the matrix or of its Hadamard transform, and the sum that the noise depends
// on; a second one writes codes and scales.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include "nvfp4.h"

#include <algorithm>
#include <vector>

#define AOTRAIN_ISA scalar
#include "cast_portable.h"
#include "nvfp4_portable.h"
#undef AOTRAIN_ISA

#if AOTRAIN_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define AOTRAIN_ISA avx2
#include "cast_portable.h"
#include "nvfp4_portable.h"
#undef AOTRAIN_ISA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma,prefer-vector-width=512")
#define AOTRAIN_ISA avx512
#include "cast_portable.h"
#include "nvfp4_portable.h"
#undef AOTRAIN_ISA
#pragma GCC pop_options
#endif

namespace aotrain {
namespace {

constexpr int64_t kUnitElements = 32768;  // a thread takes about as many at a time

int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

const Nvfp4Loops& select(int isa, int64_t input) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::select_nvfp4(input);
    if (isa == kAvx2) return avx2::select_nvfp4(input);
#endif
    (void)isa;
    return scalar::select_nvfp4(input);
}

template <class Function>
void parallel_for(int64_t units, int threads, const Function& function) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) function(unit);
}

// The largest magnitude, and the checksum where the noise needs it.
Nvfp4Measures measure(const Nvfp4& c, const Nvfp4Loops& f, int threads) {
    Nvfp4Measures all;
    const int64_t lines = c.across ? c.columns : c.rows, length = c.across ? c.rows : c.columns;
    const int64_t item = c.input == kFloat32Input ? 4 : 2;
    if (!c.transform || c.stochastic) {
        const int64_t each = std::max<int64_t>(1, kUnitElements / length), units = blocks(lines, each);
        std::vector<Nvfp4Measures> found(static_cast<size_t>(units));
        parallel_for(units, threads, [&](int64_t unit) {
            Nvfp4Measures own;
            for (int64_t i = unit * each; i < std::min(lines, (unit + 1) * each); i++)
                f.measure(static_cast<const char*>(c.x) + i * c.stride * item, length, own);
            found[static_cast<size_t>(unit)] = own;
        });
        for (const Nvfp4Measures& own : found) {
            all.amax = std::max(all.amax, own.amax);
            all.checksum += own.checksum;
        }
    }
    if (c.transform) {
        std::vector<uint32_t> found(static_cast<size_t>(blocks(c.columns, kNvfp4Block)));
        parallel_for(static_cast<int64_t>(found.size()), threads, [&](int64_t unit) {
            found[static_cast<size_t>(unit)] = f.measure_transformed(c, unit * kNvfp4Block);
        });
        all.amax = *std::max_element(found.begin(), found.end());
    }
    return all;
}

// nvfp4_global_scale of aotrain/formats/nvfp4.py.
float global_scale(uint32_t amax) {
    const double magnitude = scalar::bits_as<float>(amax);
    const auto scale = static_cast<float>((magnitude < 1e-12 ? 1e-12 : magnitude) / 2688.0);
    return scale == scale ? scale : scalar::bits_as<float>(0x7FC00000);
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_nvfp4_cast_isa() { return aotrain::best_isa(); }

// `isa` must be one that the CPU has; the operand is not empty.
void aotrain_nvfp4_cast(const aotrain::Nvfp4* cast, int isa, int threads) {
    using namespace aotrain;
    const Nvfp4& c = *cast;
    const Nvfp4Loops& f = select(isa, c.input);
    const Nvfp4Measures measures = measure(c, f, threads);
    const float global = global_scale(measures.amax);
    const Nvfp4Level level{global, 1.0f / global, static_cast<uint64_t>(measures.checksum ^ c.seed_word)};
    *c.global_scale = global;
    if (!c.across) {
        const int64_t each = c.block_rows * std::max<int64_t>(1, kUnitElements / (c.padded * c.block_rows));
        parallel_for(blocks(c.rows, each), threads, [&](int64_t unit) {
            f.cast_along(c, level, unit * each, std::min(c.rows, (unit + 1) * each));
        });
        return;
    }
    const int64_t columns = blocks(c.padded, kNvfp4TileColumns);
    parallel_for(blocks(c.rows, kNvfp4TileRows) * columns, threads, [&](int64_t unit) {
        f.cast_across(c, level, unit / columns * kNvfp4TileRows, unit % columns * kNvfp4TileColumns);
    });
}
}
