// One variant of the kernels, and launchers of it with C linkage. Included once for each variant, with HOST_SOURCE (the
// file of the kernels), HOST_VARIANT (a name for the variant) and the kernels' own macros defined.

#define HOST_PASTE_(a, b) a##_##b
#define HOST_PASTE(a, b) HOST_PASTE_(a, b)
#define HOST_LAUNCHER(name, kernel)                                                                                \
    extern "C" const char* HOST_PASTE(name, HOST_VARIANT)(unsigned x, unsigned y, unsigned threads, void** arguments, \
                                                          const int* bytes, int count) {                           \
        return host::launch(kernel, x, y, threads, arguments, bytes, count);                                       \
    }
#define prroi_forward HOST_PASTE(kernel_forward, HOST_VARIANT)
#define prroi_backward_boxes HOST_PASTE(kernel_backward_boxes, HOST_VARIANT)
#define prroi_backward_table HOST_PASTE(kernel_backward_table, HOST_VARIANT)

namespace HOST_VARIANT {
#include HOST_SOURCE
HOST_LAUNCHER(prroi_forward_on, prroi_forward)
HOST_LAUNCHER(prroi_backward_boxes_on, prroi_backward_boxes)
HOST_LAUNCHER(prroi_backward_table_on, prroi_backward_table)
}  // namespace HOST_VARIANT

#undef HOST_PASTE_
#undef HOST_PASTE
#undef HOST_LAUNCHER
#undef prroi_forward
#undef prroi_backward_boxes
#undef prroi_backward_table
