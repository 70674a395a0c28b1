// Versions, texts, and which instruction set runs.

#include "common.h"
#include "isa.h"

#ifndef CK_SOURCE_DIGEST
#define CK_SOURCE_DIGEST ""
#endif

namespace {

const char* const ISA_NAMES[ck::N_ISA] = {"portable", "avx2", "avx2vnni", "avx512", "avx512bf16"};

int fastest() {
  int isa = ck::N_ISA - 1;
  while (isa > 0 && !ck_isa_supported(isa)) isa--;
  return isa;
}

int current = -1;  // chosen at the first question; a race would choose the same

}  // namespace

// Built in, and the processor and the system have it.
extern "C" int ck_isa_supported(int isa) {
  if (isa == ck::PORTABLE) return 1;
#ifdef CK_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case ck::AVX2: return avx2;
    case ck::AVX2_VNNI: return avx2 && (avx512 || ck::has_avx_vnni());
    case ck::AVX512: return avx512;
    case ck::AVX512_BF16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vbmi2");
    default: return 0;
  }
#else
  return 0;
#endif
}

extern "C" int32_t ck_abi_version(void) { return CK_ABI_VERSION; }
extern "C" const char* ck_source_digest(void) { return CK_SOURCE_DIGEST; }
extern "C" int ck_isa_count(void) { return ck::N_ISA; }
extern "C" const char* ck_isa_name(int isa) { return isa >= 0 && isa < ck::N_ISA ? ISA_NAMES[isa] : nullptr; }

extern "C" int ck_isa_current(void) {
  if (current < 0) current = fastest();
  return current;
}

extern "C" int ck_isa_set(int isa) {
  if (isa < 0 || isa >= ck::N_ISA || !ck_isa_supported(isa)) return CK_ERR_ISA;
  current = isa;
  return CK_OK;
}

extern "C" int ck_threads_used(int n_threads) {
  int used = 1;
  parallel(n_threads, [&](int thread, int n) {
    if (thread == 0) used = n;
  });
  return used;
}

extern "C" const char* ck_status_text(int status) {
  switch (status) {
    case CK_OK: return "ok";
    case CK_ERR_NULL: return "a pointer that is needed is null";
    case CK_ERR_VERSION: return "packed for another version of the layout";
    case CK_ERR_BITS: return "a number of bits that has no kernel";
    case CK_ERR_SHAPE: return "a size out of range";
    case CK_ERR_GROUP: return "the group size does not divide the inputs";
    case CK_ERR_DTYPE: return "a dtype that has no kernel";
    case CK_ERR_BYTES: return "a buffer of another size than the layout asks for";
    case CK_ERR_ALIGNMENT: return "a buffer that is not aligned to 64 bytes";
    case CK_ERR_STRIDE: return "rows that overlap";
    case CK_ERR_THREADS: return "a number of threads below 1";
    case CK_ERR_MODE: return "an unknown kind of activations";
    case CK_ERR_ISA: return "instructions that this processor does not have";
    case CK_ERR_ZERO_POINT: return "a zero point out of range";
    default: return "unknown status";
  }
}
