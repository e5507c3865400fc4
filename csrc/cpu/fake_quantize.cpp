// Values of the codes of integer formats, and their straight-through gradient: bit for bit those of AffineFormat in
// aotrain/formats/affine.py, with zero points that are codes.
//
// Groups are adjacent elements. A few at a time, bounds, scales and values follow each other while the elements are in
// the first cache: each is read once and written once.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include "fake_quantize.h"

#include <algorithm>
#include <vector>

#define AOTRAIN_PORTABLE "fake_quantize_portable.h"
#include "portable_isas.h"
#if AOTRAIN_X86
#include "fake_quantize_avx512.h"
#endif

namespace aotrain {
namespace {

constexpr int64_t kUnitElements = 32768;  // a thread takes about as many at a time

GroupRange select(int isa, const FakeQuantize& f) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::select(f);
    if (isa == kAvx2) return avx2::select(f);
#endif
    (void)isa;
    return scalar::select(f);
}

// Function(first, last) for units of groups of `size` elements.
template <class Function>
inline void for_units(int64_t groups, int64_t size, int threads, const Function& function) {
    const int64_t each = std::max<int64_t>(1, kUnitElements / size / kGroups) * kGroups;
    const int64_t units = (groups + each - 1) / each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) function(unit * each, std::min(groups, (unit + 1) * each));
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_fake_quantize_isa() { return aotrain::best_isa(); }

// `isa` must be one that the CPU has.
void aotrain_fake_quantize(const aotrain::FakeQuantize* call, int isa, int threads) {
    using namespace aotrain;
    const FakeQuantize& f = *call;
    const GroupRange run = select(isa, f);
    for_units(f.groups, f.size, threads, [&](int64_t first, int64_t last) { run(f, first, last); });
}

// Zeros into the gradient of what saturated.
void aotrain_fake_quantize_clear(const aotrain::Clear* call, int isa, int threads) {
    using namespace aotrain;
    const Clear& c = *call;
    auto* run = scalar::clear_range;
#if AOTRAIN_X86
    if (isa == kAvx512) run = avx512::clear_range;
#endif
    (void)isa;
    for_units(c.groups, c.size, threads, [&](int64_t first, int64_t last) { run(c, first, last); });
}
}
