// Compiled twice: for AVX-VNNI, and (CK_VNNI = 2) for processors that have the instruction only as part of AVX-512.
#include "roofline_256.h"

#if CK_VNNI == 1
const ck::Roofline* ck::roofline_avx2vnni() { return &loops; }
#else
const ck::Roofline* ck::roofline_avx2vnni_vl() { return &loops; }
#endif
