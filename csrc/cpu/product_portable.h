// The loops of the emulated scaled_mm, included once per instruction set; the includer defines AOTRAIN_ISA, the name of
// the namespace. No include guard for that reason.

namespace aotrain::AOTRAIN_ISA {

template <typename To, typename From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

template <typename Bits>
void decode(const uint8_t* codes, int64_t n, const void* table, void* to) {
    const Bits* values = static_cast<const Bits*>(table);
    Bits* x = static_cast<Bits*>(to);
    for (int64_t i = 0; i < n; i++) x[i] = values[codes[i]];
}

struct Float32 {
    using Bits = uint32_t;
    static float value(Bits bits) { return bits_as<float>(bits); }
    static Bits bits(float x) { return bits_as<uint32_t>(x); }
};

struct Bfloat16 {
    using Bits = uint16_t;
    static float value(Bits bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
    // Nearest, ties to even; NaN is one NaN.
    static Bits bits(float x) {
        const uint32_t all = bits_as<uint32_t>(x), rounded = (all + 0x7FFF + ((all >> 16) & 1)) >> 16;
        return static_cast<uint16_t>((all & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
};

// First the row's scale, then the column's, each product rounded.
template <class Value, class Read>
inline void scale_row(const Product& p, int64_t row, const Read& read) {
    auto* x = static_cast<typename Value::Bits*>(p.values) + row * p.columns;
    const float row_scale = p.row_scale[row * p.row_step], column_scale = *p.column_scale;
    if (p.column_step) {
        for (int64_t i = 0; i < p.columns; i++) x[i] = Value::bits(read(i) * row_scale * p.column_scale[i]);
    } else {
        for (int64_t i = 0; i < p.columns; i++) x[i] = Value::bits(read(i) * row_scale * column_scale);
    }
}

template <class Value>
inline void scale_rows_of(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const auto* x = static_cast<const typename Value::Bits*>(p.values) + row * p.columns;
        const int32_t* sums = p.sums + row * p.columns;
        if (p.sums)
            scale_row<Value>(p, row, [=](int64_t i) { return static_cast<float>(sums[i]); });
        else
            scale_row<Value>(p, row, [=](int64_t i) { return Value::value(x[i]); });
    }
}

void scale_rows(const Product& p, int64_t first, int64_t last) {
    if (p.bf16)
        scale_rows_of<Bfloat16>(p, first, last);
    else
        scale_rows_of<Float32>(p, first, last);
}

template <class Value>
inline void scale_blocks_of(const Blocks& b, int64_t first, int64_t last) {
    const int64_t per_row = (b.columns + b.block_columns - 1) / b.block_columns;
    for (int64_t row = first; row < last; row++) {
        auto* x = static_cast<typename Value::Bits*>(b.values) + row * b.columns;
        const float* scale = b.scale + row / b.block_rows * per_row;
        for (int64_t start = 0; start < b.columns; start += b.block_columns, scale++) {
            const int64_t end = start + b.block_columns < b.columns ? start + b.block_columns : b.columns;
            for (int64_t i = start; i < end; i++) x[i] = Value::bits(Value::value(x[i]) * *scale);
        }
    }
}

void scale_blocks(const Blocks& b, int64_t first, int64_t last) {
    if (b.bf16)
        scale_blocks_of<Bfloat16>(b, first, last);
    else
        scale_blocks_of<Float32>(b, first, last);
}

constexpr ProductLoops kProductLoops{decode<uint16_t>, decode<uint32_t>, scale_rows, scale_blocks};

}  // namespace aotrain::AOTRAIN_ISA
