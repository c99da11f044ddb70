// reports.cpp - the options, and the reports of what went wrong and where.
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <mutex>

#include "api.h"

namespace emu {

static long env(const char* name, long otherwise) {
    const char* v = getenv(name);
    return v && *v ? atol(v) : otherwise;
}
std::string unknown_architecture(int number) {
    std::string known;
    for (const Architecture& a : ARCHITECTURES) {
        if (a.number == number) return "";
        known += format("%s%d", known.empty() ? "" : ", ", a.number);
    }
    return format("the architecture (EMU_ARCH) is %d, known are %s", number, known.c_str());
}
Options& options() {
    static Options* o = [] {
        Options* p = new Options;
        const std::string schedule = getenv("EMU_SCHEDULE") ? getenv("EMU_SCHEDULE") : "ascending";
        p->schedule = schedule == "descending" ? DESCENDING : schedule == "random" ? RANDOM : ASCENDING;
        if (schedule != "ascending" && p->schedule == ASCENDING) {
            fprintf(stderr, "emulator: EMU_SCHEDULE is %s, wanted ascending, descending or random\n",
                    schedule.c_str());
            exit(2);
        }
        p->seed = (unsigned)env("EMU_SEED", p->seed);
        p->lazy_streams = env("EMU_LAZY", p->lazy_streams);
        p->host_guard = env("EMU_HOST_GUARD", p->host_guard);
        p->same_site = env("EMU_SAME_SITE", p->same_site);
        p->quiet = env("EMU_QUIET", p->quiet);
        p->workers = (int)env("EMU_WORKERS", p->workers);
        p->memory_limit = (size_t)env("EMU_MEMORY_MB", (long)(p->memory_limit >> 20)) << 20;
        p->refused_epilogues = (uint32_t)env("EMU_REFUSE_EPILOGUES", p->refused_epilogues);
        p->devices = (int)env("EMU_DEVICES", p->devices);
        p->architecture = (int)env("EMU_ARCH", p->architecture);
        const std::string unknown = unknown_architecture(p->architecture);
        if (!unknown.empty()) {
            fprintf(stderr, "emulator: %s\n", unknown.c_str());
            exit(2);
        }
        p->drop_wait = (int)env("EMU_DROP_WAIT", p->drop_wait);
        p->nccl_timeout_s = (double)env("EMU_NCCL_TIMEOUT", (long)p->nccl_timeout_s);
        if (const char* log = getenv("EMU_NCCL_LOG")) p->nccl_log = log;
        return p;
    }();
    return *o;
}

// These are never destroyed, because workers outlive main.
static std::mutex& report_lock = *new std::mutex;
static std::string& report_text = *new std::string;
static std::atomic<cudaError_t> report_code{cudaSuccess};

std::string format(const char* fmt, ...) {
    char text[1024];
    va_list a;
    va_start(a, fmt);
    vsnprintf(text, sizeof text, fmt, a);
    va_end(a);
    return text;
}

static cudaError_t keep(cudaError_t code, const std::string& text, bool sticky) {
    std::lock_guard<std::mutex> lock(report_lock);
    if (report_code != cudaSuccess) return report_code;
    report_text = text;
    if (sticky) report_code = code;
    if (!options().quiet) fprintf(stderr, "emulator: %s\n", text.c_str());
    return code;
}
cudaError_t report(cudaError_t code, const std::string& text) { return keep(code, text, true); }
cudaError_t refuse(cudaError_t code, const std::string& text) { return keep(code, text, false); }
cudaError_t fault_code() { return report_code; }
std::string last_report() {
    std::lock_guard<std::mutex> lock(report_lock);
    return report_text;
}
void clear_error() {
    std::lock_guard<std::mutex> lock(report_lock);
    report_text.clear();
    report_code = set_last_error(cudaSuccess);
}

std::string source_of(const void* code) {
    Dl_info info;
    link_map* module;
    std::string line = format("%p", code);
    if (!dladdr1(code, &info, (void**)&module, RTLD_DL_LINKMAP)) return line;
    char self[4096] = {};
    const char* path =
        *module->l_name || readlink("/proc/self/exe", self, sizeof self - 1) <= 0 ? module->l_name : self;
    const std::string command =
        format("addr2line -Cfpe '%s' 0x%zx 2>/dev/null", path, (size_t)((uintptr_t)code - module->l_addr));
    if (FILE* p = popen(command.c_str(), "r")) {
        char text[1024];
        if (fgets(text, sizeof text, p) && *text != '?') line = text;
        pclose(p);
    }
    return line.substr(0, std::min(line.find('\n'), line.find(" (discriminator")));
}
std::string name_of(const void* kernel) {
    std::string s = source_of(kernel);
    s = s.substr(0, s.find(" at "));
    int depth = 0;
    for (size_t i = s.size(); i-- > 0 && s.back() == ')';) {  // removes the parameter list
        depth += s[i] == ')', depth -= s[i] == '(';
        if (depth == 0) return s.substr(0, i);
    }
    return s;
}

}  // namespace emu
