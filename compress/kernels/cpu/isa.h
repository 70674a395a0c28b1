// Which code a processor can run. CPUID leaf 7.1 has AVX-VNNI, for which not every compiler has a name.

#ifndef CK_ISA_H
#define CK_ISA_H

#if defined(__x86_64__)
#define CK_X86 1
#include <cpuid.h>

namespace ck {
inline bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
}  // namespace ck
#endif
#endif
