// One matrix product of ggml (or of ik_llama.cpp, which has its API) behind five functions, for scripts/bench_peers.py.
//
// y [tokens, out] = x [tokens, in] W^T, W in one of the peer's types, in several copies that take turns. What is timed is the
// peer's own graph of one ggml_mul_mat: activations are float32 and quantized inside, as in its models.
#include "ggml.h"
#ifdef PEER_GGML
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "repack.h"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kGraphBytes = size_t(1) << 20;  // of the tensors' headers and the graph

struct Peer {
    int64_t out, in, tokens;
    int threads;
    size_t bytes;  // of one copy of the weight
    ggml_context *weights = nullptr, *graphs = nullptr;
    std::vector<ggml_tensor *> weight;
    std::vector<ggml_cgraph *> graph;
    ggml_tensor *x = nullptr;
    std::vector<ggml_tensor *> y;
#ifdef PEER_GGML
    ggml_backend_t backend = nullptr;
    ggml_backend_buffer_t weight_buffer = nullptr, graph_buffer = nullptr;
#else
    void *memory = nullptr;
    std::vector<uint8_t> work;
#endif
};

ggml_context *context(bool no_alloc, size_t bytes) {
    return ggml_init({bytes, nullptr, no_alloc});
}

#ifdef PEER_GGML
void silent(ggml_log_level, const char *, void *) {}
#endif

void advise(void *data, size_t bytes, bool huge) {
    uintptr_t first = reinterpret_cast<uintptr_t>(data) / 4096 * 4096;
    madvise(reinterpret_cast<void *>(first), reinterpret_cast<uintptr_t>(data) + bytes - first, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

}  // namespace

extern "C" {

#ifdef PEER_IK  // attention, which is not built
size_t iqk_fa_work_buffer_size(const ggml_tensor *, int) { return 0; }
bool iqk_flash_attn_noalibi(void) { return false; }
#endif

// The number of a type by its name ("q4_0", "q4_0_r8", ...); -1 where the peer has none of that name.
int peer_type(const char *name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char *known = ggml_type_name(static_cast<ggml_type>(type));
        if (known && std::strcmp(known, name) == 0) return type;
    }
    return -1;
}

void peer_close(Peer *peer) {
    if (!peer) return;
#ifdef PEER_GGML
    if (peer->weight_buffer) ggml_backend_buffer_free(peer->weight_buffer);
    if (peer->graph_buffer) ggml_backend_buffer_free(peer->graph_buffer);
    if (peer->backend) ggml_backend_free(peer->backend);
#else
    std::free(peer->memory);
#endif
    if (peer->weights) ggml_free(peer->weights);
    if (peer->graphs) ggml_free(peer->graphs);
    delete peer;
}

// rows [n_rows, in] float32 are quantized once and repeated until there are `out` of them, in each of the copies.
// repack: take ggml's buffer that interleaves rows. huge: ask for 2M pages. nullptr: the peer can not.
Peer *peer_open(int type_number, const float *rows, int64_t n_rows, int64_t out, int64_t in, int64_t tokens, int copies,
                int threads, int repack, int huge) {
    const auto type = static_cast<ggml_type>(type_number);
#ifdef PEER_GGML
    ggml_log_set(silent, nullptr);
#endif
    auto *peer = new Peer{out, in, tokens, threads, 0};
    const size_t row_bytes = ggml_row_size(type, in);
    std::vector<char> some(row_bytes * n_rows), all(row_bytes * out);
    if (type == GGML_TYPE_F32) {
        std::memcpy(some.data(), rows, some.size());
    } else {
        ggml_quantize_init(type);
#ifdef PEER_GGML
        ggml_quantize_chunk(type, rows, some.data(), 0, n_rows, in, nullptr);
#else
        ggml_quantize_chunk(type, rows, some.data(), 0, n_rows, in, nullptr, nullptr);
#endif
    }
    for (size_t at = 0; at < all.size(); at += some.size()) {
        std::memcpy(all.data() + at, some.data(), std::min(some.size(), all.size() - at));
    }
    peer->bytes = all.size();
    peer->weights = context(true, ggml_tensor_overhead() * (copies + 1));
    for (int copy = 0; copy < copies; ++copy) peer->weight.push_back(ggml_new_tensor_2d(peer->weights, type, in, out));
#ifdef PEER_GGML
    peer->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(peer->backend, threads);
    ggml_backend_buffer_type_t kind = repack ? ggml_backend_cpu_repack_buffer_type() : ggml_backend_cpu_buffer_type();
    peer->weight_buffer = ggml_backend_alloc_ctx_tensors_from_buft(peer->weights, kind);
    if (!peer->weight_buffer || (repack && !peer->weight[0]->extra)) {
        peer_close(peer);
        return nullptr;
    }
    advise(ggml_backend_buffer_get_base(peer->weight_buffer), ggml_backend_buffer_get_size(peer->weight_buffer), huge);
    for (ggml_tensor *weight : peer->weight) ggml_backend_tensor_set(weight, all.data(), 0, all.size());
    peer->graphs = context(true, kGraphBytes + copies * (ggml_graph_overhead() + 4 * ggml_tensor_overhead()));
#else
    (void)repack;
    const size_t stride = (all.size() + 127) / 64 * 64, total = (stride * copies + kHugePage - 1) / kHugePage * kHugePage;
    peer->memory = std::aligned_alloc(kHugePage, total);
    advise(peer->memory, total, huge);
    for (int copy = 0; copy < copies; ++copy) {
        peer->weight[copy]->data = static_cast<char *>(peer->memory) + copy * stride;
        std::memcpy(peer->weight[copy]->data, all.data(), all.size());
    }
    peer->graphs = context(false, kGraphBytes + copies * (ggml_graph_overhead() + 4 * ggml_tensor_overhead()) +
                                      4 * tokens * (in + copies * out) + 4096 * copies);
#endif
    peer->x = ggml_new_tensor_2d(peer->graphs, GGML_TYPE_F32, in, tokens);
    for (ggml_tensor *weight : peer->weight) {
        ggml_tensor *y = ggml_mul_mat(peer->graphs, weight, peer->x);
        ggml_cgraph *graph = ggml_new_graph(peer->graphs);
        ggml_build_forward_expand(graph, y);
        peer->y.push_back(y);
        peer->graph.push_back(graph);
    }
#ifdef PEER_GGML
    peer->graph_buffer = ggml_backend_alloc_ctx_tensors(peer->graphs, peer->backend);
#else
    ggml_cplan plan = ggml_graph_plan(peer->graph[0], threads);
    peer->work.resize(plan.work_size + 64);
#endif
    return peer;
}

int64_t peer_bytes(const Peer *peer) { return static_cast<int64_t>(peer->bytes); }

void peer_input(Peer *peer, const float *x) {
    std::memcpy(peer->x->data, x, sizeof(float) * peer->tokens * peer->in);
}

int peer_run(Peer *peer, int copy) {
#ifdef PEER_GGML
    return ggml_backend_graph_compute(peer->backend, peer->graph[copy]);
#else
    ggml_cplan plan = ggml_graph_plan(peer->graph[copy], peer->threads);
    plan.work_data = peer->work.data();
    return ggml_graph_compute(peer->graph[copy], &plan);
#endif
}

void peer_output(const Peer *peer, int copy, float *y) {
    std::memcpy(y, peer->y[copy]->data, sizeof(float) * peer->tokens * peer->out);
}
}
