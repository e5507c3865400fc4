// The loop of nvfp4_mm, included once per instruction set; the includer defines AOTRAIN_ISA, the name of the namespace.
// No include guard for that reason.

namespace aotrain::AOTRAIN_ISA {

template <typename To, typename From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

inline float value_of_e4m3(uint8_t code) {
    const int32_t exponent = code >> 3 & 15, mantissa = code & 7;
    if (code >= 0x7F) return __builtin_nanf("");  // scales have no sign
    if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-9f;
    return bits_as<float>((exponent + 120) << 23 | mantissa << 20);
}

// data * scale, exactly: 2 bits times 4. Twice a value of e2m1 is a whole number, 0 1 2 3 4 6 8 12.
template <typename Bits>
inline void decode_blocks(const uint8_t* data, const uint8_t* scale, int64_t blocks, Bits* to) {
    constexpr int kShift = 32 - 8 * sizeof(Bits);  // bfloat16 is the upper half
    for (int64_t b = 0; b < blocks; b++, data += 8, to += 16) {
        const float half = value_of_e4m3(scale[b]) * 0.5f;
        int32_t code[16];
        for (int i = 0; i < 8; i++) {
            code[2 * i] = data[i] & 15;
            code[2 * i + 1] = data[i] >> 4;
        }
        for (int i = 0; i < 16; i++) {
            const int32_t magnitude = code[i] & 7, exponent = magnitude >> 1, normal = (exponent - 1) & ~(exponent - 1) >> 31;
            const int32_t leading = -exponent >> 31 & 2;
            const int32_t twice = ((magnitude & 1) | leading) << normal;
            const int32_t bits = bits_as<int32_t>(static_cast<float>(twice) * half);
            to[i] = static_cast<Bits>(static_cast<uint32_t>(bits | (code[i] & 8) << 28) >> kShift);
        }
    }
}

void decode_nvfp4(const uint8_t* data, const uint8_t* scale, int64_t blocks, bool bf16, void* to) {
    if (bf16)
        decode_blocks(data, scale, blocks, static_cast<uint16_t*>(to));
    else
        decode_blocks(data, scale, blocks, static_cast<uint32_t*>(to));
}

}  // namespace aotrain::AOTRAIN_ISA
