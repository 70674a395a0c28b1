// What the processor can do at most: bytes read per second, operations of each arithmetic unit per second. The caller holds
// the clock.

#include "roofline.h"

#include "isa.h"

namespace {

const ck::Roofline* loops_of(int isa) {
#ifdef CK_X86
  switch (isa) {
    case ck::AVX2: return ck::roofline_avx2();
    case ck::AVX2_VNNI: return ck::has_avx_vnni() ? ck::roofline_avx2vnni() : ck::roofline_avx2vnni_vl();
    case ck::AVX512: return ck::roofline_avx512();
    case ck::AVX512_BF16: return ck::roofline_avx512bf16();
    default: break;
  }
#endif
  (void)isa;
  return ck::roofline_portable();
}

}  // namespace

extern "C" int ck_roofline_read(const void* buffer, int64_t bytes, int32_t n_threads, uint64_t* mixed) {
  if (!buffer || !mixed) return CK_ERR_NULL;
  if (bytes < 0 || bytes % 64) return CK_ERR_BYTES;
  if (!aligned(buffer, 64)) return CK_ERR_ALIGNMENT;
  if (n_threads < 1) return CK_ERR_THREADS;
  const ck::Roofline* loops = loops_of(ck_isa_current());
  const uint8_t* from = static_cast<const uint8_t*>(buffer);
  *mixed = 0;
  parallel(n_threads, [&](int thread, int n) {
    const Range lines = share(bytes / 64, thread, n);
    const uint64_t own = loops->read(from + lines.begin * 64, (lines.end - lines.begin) * 64);
    __atomic_fetch_xor(mixed, own, __ATOMIC_RELAXED);
  });
  return CK_OK;
}

extern "C" int64_t ck_roofline_compute(int32_t unit, int64_t rounds, int32_t n_threads) {
  if (unit < 0 || unit > 2) return CK_ERR_MODE;
  if (rounds < 1) return CK_ERR_SHAPE;
  if (n_threads < 1) return CK_ERR_THREADS;
  const ck::Unit& loop = loops_of(ck_isa_current())->units[unit];
  if (!loop.run) return CK_ERR_ISA;
  int used = 1;
  parallel(n_threads, [&](int thread, int n) {
    loop.run(rounds);
    if (thread == 0) used = n;
  });
  return loop.per_round * rounds * used;
}
