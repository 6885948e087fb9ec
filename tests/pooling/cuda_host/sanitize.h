// Runs the three kernels of a variant on boxes of every kind, on buffers of exactly the right size, for a sanitizer to
// watch. Inputs are made here, so that the program needs no instrumented Python around it.
#pragma once

#include <cstdio>

namespace host {

using Launcher = const char* (*)(unsigned, unsigned, unsigned, void**, const int*, int);

struct Kernels {
    Launcher forward, backward_boxes, backward_table;
    int bins, lanes, storage;  // storage: bytes of a feature
};

template <class... Arguments>
void run(Launcher launcher, unsigned x, unsigned y, unsigned threads, Arguments... arguments) {
    void* addresses[] = {&arguments...};
    const int bytes[] = {static_cast<int>(sizeof arguments)...};
    if (const char* problem = launcher(x, y, threads, addresses, bytes, sizeof...(arguments))) {
        std::printf("launch failed: %s\n", problem);
        std::exit(2);
    }
}

inline void exercise(const Kernels& kernels) {
    const float inf = INFINITY, nan = NAN;
    const std::vector<int> sizes = {5, 6, 3, 3, 0, 4, 2, 2};  // no box lies on the last
    const std::vector<long long> offsets = {0, 30, 39, 39};
    const std::vector<float> strides = {4.f, 8.f, 16.f, 4.f};
    std::vector<float> boxes = {
        3.f,  2.f,  17.f, 15.f,  // inside
        8.f,  8.f,  16.f, 16.f,  // edges on cells
        -9.f, -9.f, 60.f, 60.f,  // beyond the map on all sides
        9.f,  9.f,  9.01f, 9.01f, 90.f, 90.f, 99.f, 99.f,  // tiny; outside
        9.f,  9.f,  3.f,  12.f,  // inverted
        -1e30f, -3e38f, 1e30f, 3e38f,  // diverged
        nan,  1.f,  2.f,  3.f, 1.f, -inf, 2.f, 3.f, 0.f, 0.f, inf, inf,
        2.f,  2.f,  9.f,  9.f, 2.f, 2.f, 9.f, 9.f, 2.f, 2.f, 9.f, 9.f,  // on maps that are empty or do not exist
    };
    std::vector<int> map_index = {0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 2, 4, -1};
    const int count = static_cast<int>(map_index.size()), maps = static_cast<int>(strides.size());
    const int packs = 3, channels = packs * kernels.lanes, bins = kernels.bins;
    const long long rows = 43;
    auto features = [&](std::size_t cells) {  // bits of small finite numbers in every storage type
        std::vector<unsigned char> bytes(cells * channels * kernels.storage);
        for (std::size_t i = 0; i < bytes.size(); ++i)
            bytes[i] = i % kernels.storage == kernels.storage - 1u ? 0x3c + i % 5 : i * 37 & 0x7f;
        return bytes;
    };
    const auto cells = static_cast<std::size_t>(count) * bins * bins;
    const auto table = features(rows);
    auto grad = features(cells);
    std::vector<unsigned char> output(grad.size()), grad_table(table.size());
    std::vector<float> grad_boxes(4 * count);
    run(kernels.forward, count, 2, 64, table.data(), rows, packs, sizes.data(), offsets.data(), strides.data(), maps,
        boxes.data(), map_index.data(), 0.5f, output.data());
    run(kernels.backward_boxes, count, 1, 64, grad.data(), table.data(), rows, packs, sizes.data(), offsets.data(),
        strides.data(), maps, boxes.data(), map_index.data(), 0.5f, grad_boxes.data());
    for (int box = 0; box < count; ++box) {  // the last six are invalid, but for the one on an empty map
        const bool invalid = box >= 7 && box != 10;
        if ((grad_boxes[4 * box] != grad_boxes[4 * box]) != invalid) {
            std::printf("box %d: gradient %g\n", box, grad_boxes[4 * box]);
            std::exit(3);
        }
    }
    // More boxes than a block has threads, so that it looks through them in several turns.
    const int repeats = 5;
    for (int i = 4 * count; i < 4 * count * repeats; ++i) boxes.push_back(boxes[i - 4 * count]);
    for (int i = count; i < count * repeats; ++i) map_index.push_back(map_index[i - count]);
    grad = features(cells * repeats);
    run(kernels.backward_table, static_cast<unsigned>(rows), 1, 64, grad.data(), rows, packs, sizes.data(),
        offsets.data(), strides.data(), maps, boxes.data(), map_index.data(), count * repeats, 0.5f, grad_table.data());
}

}  // namespace host
