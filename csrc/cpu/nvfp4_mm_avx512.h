// Decoding with AVX-512: a block's 16 codes select from the 16 values of e2m1 in one instruction.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")

namespace aotrain::avx512 {

template <bool kBfloat16>
inline void decode_blocks(const uint8_t* data, const uint8_t* scale, int64_t blocks, char* to) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f,
                                         -2.0f, -3.0f, -4.0f, -6.0f);
    const __m128i nibble = _mm_set1_epi8(15);
    for (int64_t b = 0; b < blocks; b++, data += 8, to += kBfloat16 ? 32 : 64) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(data));
        const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        const __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)), values);
        const __m512 product = _mm512_mul_ps(value, _mm512_set1_ps(scalar::value_of_e4m3(scale[b])));
        if (kBfloat16) {  // the upper halves
            const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(product), 16);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits));
        } else {
            _mm512_storeu_ps(to, product);
        }
    }
}

void decode_nvfp4(const uint8_t* data, const uint8_t* scale, int64_t blocks, bool bf16, void* to) {
    if (bf16)
        decode_blocks<true>(data, scale, blocks, static_cast<char*>(to));
    else
        decode_blocks<false>(data, scale, blocks, static_cast<char*>(to));
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
