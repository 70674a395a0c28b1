#include "roofline_256.h"

const ck::Roofline* ck::roofline_avx2() { return &loops; }
