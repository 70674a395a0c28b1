// Fibers for emulation.h, and a build of all kernels for the CPU: this is one translation unit.

#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <vector>

namespace emulate {

Index thread_index, block_index;
dim3 block_shape, grid_shape;

namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool real;
};

struct Fiber {
  ucontext_t context;  // how it begins; from then on it jumps, which takes no system calls
  jmp_buf parked;
  bool begun;
  std::vector<char> stack;
  Index index;
  bool done;
  std::vector<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
};

enum Kind { NONE, BARRIER, SHUFFLE, MULTIPLY };

struct Warp {
  int arrived, lanes;
  Kind kind;
  unsigned generation;
  float value[WARP], sum[WARP][4];
  uint32_t a[WARP][4], b[WARP][2];
  float (*of)(uint16_t);
};

std::vector<Fiber*> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared;
jmp_buf scheduler;
const std::function<void()>* kernel;
size_t current;
int barrier_arrived, n_threads;
unsigned barrier_generation;
uint64_t progress;  // counts what lets a parked fiber go on

Fiber& fiber() { return *fibers[current]; }
Warp& warp() { return warps[current / WARP]; }

void park() {
  if (!_setjmp(fiber().parked)) _longjmp(scheduler, 1);
}

// Runs the current fiber until it parks or is done.
__attribute__((noinline)) void resume() {
  if (_setjmp(scheduler)) return;
  if (fiber().begun) _longjmp(fiber().parked, 1);
  fiber().begun = true;
  setcontext(&fiber().context);
}

void run() {
  (*kernel)();
  Fiber& f = fiber();
  for (auto& group : f.groups)
    for (auto& copy : group)
      if (copy.real) fail("a copy that nobody waited for");
  if (!f.open.empty()) fail("a copy that was never committed");
  f.done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

// Parks until all lanes of the warp have come to the same instruction; the last one carries it out.
void collective(Kind kind, void (*act)(Warp&)) {
  Warp& w = warp();
  if (w.arrived && w.kind != kind) fail("lanes of a warp in different instructions");
  w.kind = kind;
  if (++w.arrived == w.lanes) {
    if (act) act(w);
    w.arrived = 0;
    ++w.generation;
    ++progress;
    return;
  }
  for (const unsigned generation = w.generation; w.generation == generation;) park();
}

void act_multiply(Warp& w) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      const int d_lane = row % 8 * 4 + column / 2, d_at = row / 8 * 2 + column % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const int t = k % 8 / 2;
        const uint32_t a = w.a[row % 8 * 4 + t][row / 8 + k / 8 * 2], b = w.b[column * 4 + t][k / 8];
        sum += double(w.of(uint16_t(a >> k % 2 * 16))) * w.of(uint16_t(b >> k % 2 * 16));
      }
      w.sum[d_lane][d_at] = float(w.sum[d_lane][d_at] + sum);
    }
}

void run_block() {
  barrier_arrived = 0;
  std::fill(shared.begin(), shared.end(), 0xff);
  for (int i = 0; i < n_threads; ++i) {
    Fiber& f = *fibers[i];
    f.done = f.begun = false;
    f.groups.clear();
    f.open.clear();
    f.index = {i % block_shape.x, i / block_shape.x % block_shape.y, i / block_shape.x / block_shape.y};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, run, 0);
  }
  warps.assign((n_threads + WARP - 1) / WARP, Warp());
  for (size_t w = 0; w < warps.size(); ++w) warps[w].lanes = std::min(WARP, n_threads - int(w) * WARP);
  for (bool forward = true, all = false; !all; forward = !forward) {  // both ways: no lane is always the first
    all = true;
    const uint64_t before = progress;
    for (int i = 0; i < n_threads; ++i) {
      current = forward ? i : n_threads - 1 - i;
      if (fiber().done) continue;
      all = false;
      thread_index = fiber().index;
      resume();
    }
    if (!all && progress == before) fail("threads wait for each other for ever");
  }
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "emulation: %s (block %u,%u,%u, thread %u)\n", what, block_index.x, block_index.y, block_index.z,
          thread_index.x);
  abort();
}

void launch(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body) {
  kernel = &body;
  block_shape = block;
  grid_shape = grid;
  n_threads = int(block.x * block.y * block.z);
  while (int(fibers.size()) < n_threads) {
    fibers.push_back(new Fiber);
    fibers.back()->stack.resize(STACK);
  }
  std::vector<unsigned char>(size_t(shared_bytes + 128)).swap(shared);
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block();
}

unsigned char* shared_memory() {  // at a multiple of 128
  return shared.data() + (128 - reinterpret_cast<uintptr_t>(shared.data()) % 128) % 128;
}

void copy_async(void* to, const void* from, int bytes, bool real) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  const unsigned char* p = static_cast<unsigned char*>(to);
  if (p < shared.data() || p + bytes > shared.data() + shared.size()) fail("a copy behind shared memory");
  fiber().open.push_back({to, from, bytes, real});
}

void copy_commit() {
  fiber().groups.emplace_back();
  fiber().groups.back().swap(fiber().open);
}

void copy_wait(int n) {
  auto& groups = fiber().groups;
  while (int(groups.size()) > n) {
    for (auto& c : groups.front()) c.real ? memcpy(c.to, c.from, c.bytes) : memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

void block_barrier() {
  if (++barrier_arrived == n_threads) {
    barrier_arrived = 0;
    ++barrier_generation;
    ++progress;
    return;
  }
  for (const unsigned generation = barrier_generation; barrier_generation == generation;) park();
}

void warp_barrier() { collective(BARRIER, nullptr); }

float from_lane(float value, int lane) {
  Warp& w = warp();
  w.value[current % WARP] = value;
  collective(SHUFFLE, nullptr);
  const float got = w.value[lane];
  collective(SHUFFLE, nullptr);  // all have read before the next value is put down
  return got;
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, float (*of)(uint16_t)) {
  Warp& w = warp();
  const int lane = int(current % WARP);
  memcpy(w.a[lane], a, 16);
  memcpy(w.sum[lane], d, 16);
  w.b[lane][0] = b0, w.b[lane][1] = b1;
  w.of = of;
  collective(MULTIPLY, act_multiply);
  memcpy(d, w.sum[lane], 16);
}

}  // namespace emulate

cudaError_t cudaGetLastError() { return cudaSuccess; }
