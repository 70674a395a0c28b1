// Codes to 16-bit floats without conversion instructions, and between 16-bit floats and float32.
//
// A code of b bits at bit o of a 16-bit half, or-ed into the pattern of 2^M (M mantissa bits, ulp 1), is 2^M + 2^o code as
// long as o + b <= M. One fused multiply-add of both halves gives 2^-o (2^M + 2^o code) - (2^(M-o) + c) = code - c, every
// step exact; c = 2^(b-1), the middle code. fp16 (M = 10) reads up to 5 codes of 2 bits per shift, bf16 (M = 7) up to 3.
// 8 bits do not fit bf16's mantissa: there the byte is put into the pattern of 2^23 in float32 and subtracted there.

#ifndef CC_CONVERT_H
#define CC_CONVERT_H

#include "intrinsics.h"
#include "layout.h"

// Where the low half of pair p lies in a step's words: pairs 0..14 of 3 bits too.
template <int BITS>
struct Field {
  static constexpr int PER_WORD = 16 / BITS;
  static constexpr int PAIRS = PER_WORD * BITS;  // 16, or 15 of 3 bits
};

CC_CONST uint32_t both(uint32_t half) { return half | half << 16; }

// 2^M; 2^-o; -(2^(M-o) + c), in both halves.
template <class T>
CC_CONST uint32_t magic() { return both(uint32_t(T::BIAS + T::MANTISSA) << T::MANTISSA); }
template <class T>
CC_CONST uint32_t inverse_power(int o) { return both(uint32_t(T::BIAS - o) << T::MANTISSA); }
template <class T, int BITS>
CC_CONST uint32_t minus_middle(int o) {
  return both(0x8000u | uint32_t(T::BIAS + T::MANTISSA - o) << T::MANTISSA | (1u << (BITS - 1)) << o);
}

// The right shift after which the field at bit `offset` can be read: as few different ones as there can be.
template <class T, int BITS>
CC_CONST int shift_for(int offset) {
  int shift = 0;
  for (int o = 0; o <= offset; o += BITS)
    if (o - shift + BITS > T::MANTISSA) shift = o;
  return shift;
}

template <class T, int BITS, int OFFSET>
CC_DEVICE uint32_t field(uint32_t word) {
  constexpr int shift = shift_for<T, BITS>(OFFSET), o = OFFSET - shift;
  constexpr uint32_t mask = both(((1u << BITS) - 1) << o), one = magic<T>();
  constexpr uint32_t factor = inverse_power<T>(o), offset = minus_middle<T, BITS>(o);
  return fma_pair<T>(and_or(word >> shift, mask, one), factor, offset);
}

// The last pair of 3 bits: its bits are the top bits of the halves of three words.
template <class T>
CC_DEVICE uint32_t scattered(const uint32_t* words) {
  constexpr uint32_t one = magic<T>(), factor = inverse_power<T>(0), offset = minus_middle<T, 3>(0);
  uint32_t code = (words[0] >> 15 & 0x00010001u) | (words[1] >> 14 & 0x00020002u) | (words[2] >> 13 & 0x00040004u);
  return fma_pair<T>(code | one, factor, offset);
}

// Both bytes of pair p (bytes 0, 2 or 1, 3 of a word) less 128.
template <class T>
CC_DEVICE uint32_t bytes_as_pair(uint32_t word, bool second) {
  const float bias = 8388608.0f + 128.0f;
  float low = float_of_bits(permute(word, 0x4B000000u, second ? 0x7541 : 0x7540)) - bias;
  float high = float_of_bits(permute(word, 0x4B000000u, second ? 0x7543 : 0x7542)) - bias;
  return pack_pair<T>(low, high);
}

template <class T, int BITS, int PAIR>
CC_DEVICE uint32_t pair(const uint32_t* words) {
  if constexpr (BITS == 3 && PAIR == 15) return scattered<T>(words);
  else {
    constexpr int word = PAIR / Field<BITS>::PER_WORD, offset = PAIR % Field<BITS>::PER_WORD * BITS;
    if constexpr (BITS > T::MANTISSA) return bytes_as_pair<T>(words[word], offset != 0);
    else return field<T, BITS, offset>(words[word]);
  }
}

// The fragment of row tile M (4 registers) of a step: codes less the middle code.
template <class T, int BITS, int M>
CC_DEVICE void fragment(const uint32_t* words, uint32_t* a) {
  a[0] = pair<T, BITS, 4 * M>(words);
  a[1] = pair<T, BITS, 4 * M + 1>(words);
  a[2] = pair<T, BITS, 4 * M + 2>(words);
  a[3] = pair<T, BITS, 4 * M + 3>(words);
}

// The 8 scales of a lane (m, hi), of either dtype.
CC_DEVICE void scales_of(const uint4& packed, bool bf16, float* scale) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[2 * i] = bf16 ? float_of_half<BF16>(uint16_t(words[i])) : float_of_half<F16>(uint16_t(words[i]));
    scale[2 * i + 1] = bf16 ? float_of_half<BF16>(uint16_t(words[i] >> 16)) : float_of_half<F16>(uint16_t(words[i] >> 16));
  }
}

// Byte i of the 8 zero points of a lane, less the middle code: exact, by the pattern of 2^23.
template <int BITS>
CC_DEVICE float zero_of(const uint2& zeros, int i) {
  uint32_t bits = permute(i < 4 ? zeros.x : zeros.y, 0x4B000000u, 0x7540 | (i & 3));
  return float_of_bits(bits) - (8388608.0f + float(1 << (BITS - 1)));
}

#endif
