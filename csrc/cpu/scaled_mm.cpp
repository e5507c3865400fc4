// What the emulated float8 product does around its bfloat16 or float32 product of codes: decode both operands, and
// scale the result in place; bit for bit the torch expressions of aotrain/kernels/_mm_cpu.py.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include "product.h"

#include <algorithm>

#define AOTRAIN_PORTABLE "product_portable.h"
#include "portable_isas.h"
#if AOTRAIN_X86
#include "product_avx512.h"
#endif

namespace aotrain {
namespace {

constexpr int64_t kUnitElements = 32768;  // a thread takes about as many at a time

const ProductLoops& select(int isa) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::kProductLoops;
    if (isa == kAvx2) return avx2::kProductLoops;
#endif
    (void)isa;
    return scalar::kProductLoops;
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_scaled_mm_isa() { return aotrain::best_isa(); }

// to[i] = table[codes[i]], values of `item` bytes, 2 or 4; `isa` must be one that the CPU has.
void aotrain_decode(const uint8_t* codes, int64_t n, const void* table, int64_t item, void* to, int isa, int threads) {
    using namespace aotrain;
    const auto decode = item == 2 ? select(isa).decode16 : select(isa).decode32;
    const int64_t units = (n + kUnitElements - 1) / kUnitElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t first = unit * kUnitElements;
        decode(codes + first, std::min(kUnitElements, n - first), table, static_cast<char*>(to) + first * item);
    }
}

// values[i][j] = values[i][j] * the scale of its block in float32, rounded once to the type of the values.
void aotrain_scale_blocks(const aotrain::Blocks* blocks, int isa, int threads) {
    using namespace aotrain;
    const int64_t each = std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, blocks->columns));
    const int64_t units = (blocks->rows + each - 1) / each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++)
        select(isa).scale_blocks(*blocks, unit * each, std::min(blocks->rows, (unit + 1) * each));
}

// values[i][j] = (sums or values)[i][j] * row_scale[i] * column_scale[j] in float32, rounded once to the values' type.
void aotrain_scale_product(const aotrain::Product* product, int isa, int threads) {
    using namespace aotrain;
    const int64_t each = std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, product->columns));
    const int64_t units = (product->rows + each - 1) / each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++)
        select(isa).scale_rows(*product, unit * each, std::min(product->rows, (unit + 1) * each));
}
}
