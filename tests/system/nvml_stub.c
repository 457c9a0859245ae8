/* A stand-in for NVIDIA's management library: eight GPUs that misbehave, each in its own way.
 *
 *   0  sound; with GPM; holds the process NVML_STUB_PID
 *   1  XID 79 half a second after its events are first listened to, and a program's XID 31; with GPM
 *   2  gives no power
 *   3  slowed down by heat
 *   4  has fallen off the bus
 *   5  uncorrected ECC errors, rows that wait to be remapped
 *   6  an NVLink whose errors grow, another that goes down
 *   7  takes NVML_STUB_HANG seconds for each figure, if that is set
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int result;
enum { OK = 0, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, LOST = 15 };

struct device { unsigned int index; unsigned int asked; };
static struct device devices[8] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static result answer(struct device *d) {
    const char *seconds = getenv("NVML_STUB_HANG");
    if (d->index == 7 && seconds) usleep((useconds_t)(atof(seconds) * 1e6));
    return d->index == 4 ? LOST : OK;
}
#define ANSWER(d) do { result r = answer(d); if (r) return r; } while (0)

result nvmlInitWithFlags(unsigned int flags) { return OK; }
result nvmlInit_v2(void) { return OK; }
result nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(result r) { return r == LOST ? "GPU is lost" : "Not Supported"; }
result nvmlDeviceGetCount_v2(unsigned int *count) { *count = 8; return OK; }
result nvmlDeviceGetHandleByIndex_v2(unsigned int i, struct device **d) { *d = &devices[i]; return OK; }
result nvmlDeviceGetName(struct device *d, char *name, unsigned int length) { snprintf(name, length, "Stub %u", d->index); return OK; }

struct pci { char legacy[16]; unsigned int domain, bus, device, id, subsystem; char bus_id[32]; };
result nvmlDeviceGetPciInfo_v3(struct device *d, struct pci *p) {
    memset(p, 0, sizeof *p);
    snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", d->index + 16);
    return OK;
}

struct memory { unsigned long long total, free, used; };
result nvmlDeviceGetMemoryInfo(struct device *d, struct memory *m) {
    ANSWER(d);
    m->total = 80ULL << 30;
    m->used = (unsigned long long)(d->index + 1) << 30;
    m->free = m->total - m->used;
    return OK;
}
struct utilisation { unsigned int gpu, memory; };
result nvmlDeviceGetUtilizationRates(struct device *d, struct utilisation *u) {
    ANSWER(d);
    u->gpu = 10 * d->index;
    u->memory = 1;
    return OK;
}
result nvmlDeviceGetTemperature(struct device *d, int sensor, unsigned int *t) { ANSWER(d); *t = d->index == 3 ? 91 : 40 + d->index; return OK; }
result nvmlDeviceGetTemperatureThreshold(struct device *d, int threshold, unsigned int *t) { ANSWER(d); *t = 90; return OK; }
result nvmlDeviceGetPowerUsage(struct device *d, unsigned int *p) { ANSWER(d); if (d->index == 2) return NOT_SUPPORTED; *p = 300000; return OK; }
result nvmlDeviceGetEnforcedPowerLimit(struct device *d, unsigned int *p) { ANSWER(d); *p = 700000; return OK; }
result nvmlDeviceGetClockInfo(struct device *d, int kind, unsigned int *mhz) { ANSWER(d); *mhz = d->index == 3 ? 900 : 1755; return OK; }
result nvmlDeviceGetMaxClockInfo(struct device *d, int kind, unsigned int *mhz) { ANSWER(d); *mhz = 1980; return OK; }

/* Power capping (4) is what sound cards do; heat (0x40 with 8) is not. */
result nvmlDeviceGetCurrentClocksEventReasons(struct device *d, unsigned long long *reasons) {
    ANSWER(d);
    *reasons = d->index == 3 ? 0x48 : 4;
    return OK;
}
result nvmlDeviceGetTotalEccErrors(struct device *d, unsigned int kind, unsigned int counter, unsigned long long *count) {
    ANSWER(d);
    *count = d->index == 5 ? 2 : 0;
    return OK;
}
result nvmlDeviceGetRemappedRows(struct device *d, unsigned int *corrected, unsigned int *uncorrected, unsigned int *pending, unsigned int *failed) {
    ANSWER(d);
    *corrected = *failed = 0;
    *uncorrected = *pending = d->index == 5;
    return OK;
}
result nvmlDeviceGetNvLinkState(struct device *d, unsigned int link, unsigned int *up) {
    ANSWER(d);
    if (link >= 4) return NOT_SUPPORTED;
    *up = !(d->index == 6 && link == 1 && d->asked > 4);
    return OK;
}
result nvmlDeviceGetNvLinkErrorCounter(struct device *d, unsigned int link, unsigned int counter, unsigned long long *count) {
    ANSWER(d);
    *count = d->index == 6 && link == 3 && counter == 0 ? 10ULL * ++d->asked : 7;
    return OK;
}
result nvmlDeviceGetPcieReplayCounter(struct device *d, unsigned int *count) { ANSWER(d); *count = 3; return OK; }

struct process { unsigned int pid; unsigned long long memory; unsigned int gpu, compute; };
result nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned int *count, struct process *found) {
    ANSWER(d);
    const char *pid = getenv("NVML_STUB_PID");
    unsigned int there = d->index == 0 && pid != NULL;
    if (*count < there) { *count = there; return INSUFFICIENT_SIZE; }
    if (there && found) { memset(found, 0, sizeof *found); found->pid = (unsigned int)atoi(pid); found->memory = 1ULL << 30; }
    *count = there;
    return OK;
}

struct events { struct device *device; double since; int told; };
struct event { struct device *device; unsigned long long type, data; unsigned int gpu, compute; };
result nvmlEventSetCreate(struct events **set) { *set = calloc(1, sizeof **set); (*set)->since = now(); return OK; }
result nvmlEventSetFree(struct events *set) { free(set); return OK; }
result nvmlDeviceRegisterEvents(struct device *d, unsigned long long types, struct events *set) { set->device = d; return OK; }
result nvmlEventSetWait_v2(struct events *set, struct event *event, unsigned int ms) {
    static const int codes[] = {31, 79};
    if (!set->device || set->device->index != 1 || set->told >= 2 || now() - set->since < 0.5) return TIMEOUT;
    memset(event, 0, sizeof *event);
    event->device = set->device;
    event->type = 8;
    event->data = codes[set->told++];
    return OK;
}

struct gpm_support { unsigned int version, supported; };
struct gpm_metric { unsigned int id; result returned; double value; const char *names[3]; };
struct gpm_get { unsigned int version, count; double *first, *second; struct gpm_metric metrics[]; };
result nvmlGpmQueryDeviceSupport(struct device *d, struct gpm_support *s) { s->supported = d->index < 2; return OK; }
result nvmlGpmSampleAlloc(double **sample) { *sample = calloc(1, sizeof **sample); return OK; }
result nvmlGpmSampleFree(double *sample) { free(sample); return OK; }
result nvmlGpmSampleGet(struct device *d, double *sample) { *sample = now() + 1000.0 * d->index; return OK; }
result nvmlGpmMetricsGet(struct gpm_get *get) {
    /* What lies between the samples only counts if the second was taken later. */
    if (*get->second <= *get->first) return NOT_SUPPORTED;
    for (unsigned int i = 0; i < get->count; i++) {
        get->metrics[i].returned = get->metrics[i].id == 2 || get->metrics[i].id == 5 ? OK : NOT_SUPPORTED;
        get->metrics[i].value = get->metrics[i].id == 2 ? 83.0 : 41.5;
    }
    return OK;
}
