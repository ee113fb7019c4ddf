/* Lists every kernel, copy and fill that a program runs on an NVIDIA GPU: one line each, "start_ns end_ns name gridxblock".
 *
 * CUDA loads it into any program by itself (CUDA_INJECTION64_PATH); no profiler has to be installed, only CUPTI, which comes
 * with CUDA and with PyTorch's wheels. Kernels of CUDA graphs are listed one by one. See docs/performance.md.
 *
 *     cc -O2 -shared -fPIC -I CUDA/include cuda_kernels.c -o cuda_kernels.so -L CUPTI -l:libcupti.so.13
 *     CUDA_INJECTION64_PATH=$PWD/cuda_kernels.so CUDA_KERNELS_FILE=trace.txt planish bench --backend cuda --shape 1b
 *     python3 kernel_table.py trace.txt planish_cross_entropy 4
 */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *list;

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *most_records) {
    *size = 8 << 20;
    *buffer = aligned_alloc(8, *size);
    *most_records = 0;
}

static void print_record(const CUpti_Activity *record) {
    switch (record->kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
    case CUPTI_ACTIVITY_KIND_KERNEL: {
        const CUpti_ActivityKernel10 *k = (const CUpti_ActivityKernel10 *)record;
        fprintf(list, "%llu %llu %s %d,%d,%dx%d\n", (unsigned long long)k->start, (unsigned long long)k->end, k->name, k->gridX,
                k->gridY, k->gridZ, k->blockX * k->blockY * k->blockZ);
        break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
        const CUpti_ActivityMemcpy6 *c = (const CUpti_ActivityMemcpy6 *)record;
        fprintf(list, "%llu %llu copy%d %llu\n", (unsigned long long)c->start, (unsigned long long)c->end, c->copyKind,
                (unsigned long long)c->bytes);
        break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
        const CUpti_ActivityMemset4 *m = (const CUpti_ActivityMemset4 *)record;
        fprintf(list, "%llu %llu fill %llu\n", (unsigned long long)m->start, (unsigned long long)m->end,
                (unsigned long long)m->bytes);
        break;
    }
    default:
        break;
    }
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t used) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, used, &record) == CUPTI_SUCCESS) print_record(record);
    free(buffer);
}

static void finish(void) {
    cuptiActivityFlushAll(1);
    fclose(list);
}

/* Called by the CUDA driver when it starts. */
int InitializeInjection(void) {
    const char *path = getenv("CUDA_KERNELS_FILE");
    list = path ? fopen(path, "w") : NULL;
    if (!list) return 1;
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    CUptiResult result = cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    if (result != CUPTI_SUCCESS) fprintf(stderr, "cuda_kernels: CUPTI does not list kernels (error %d)\n", result);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    atexit(finish);
    return 1;
}
