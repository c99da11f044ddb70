// comm.h - the processes that train one model together. Each is a rank, 0 to world - 1, computes its share of
// every batch, and holds all parameters; on GPUs it may hold only its share of the optimizer's arrays
// (lib/optimizer.h). Rank 0 prints, logs and saves.
//
// Collective functions combine numbers of all ranks. Every rank must call the same ones in the same order,
// with the same sizes; a rank that does not come makes the others wait. A sum has the same bits on all ranks.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "lib/io.h"

// What the command line asks of the ranks.
struct RankOptions {
    int gpus = 1;        // ranks to start on this machine
    int zero_stage = 0;  // of Sharding in lib/optimizer.h, so that a program that cannot shard can refuse it
    int device = -1;     // the GPU of a rank that trains alone; -1: CUDA's first
    int timeout = 60;    // seconds after which a rank that is not heard of counts as dead
};

class Comm {
  public:
    virtual ~Comm() = default;
    int rank = 0, world = 1;
    int on_host = 1;  // ranks on this machine, which share its processors and memory
    bool leads() const { return rank == 0; }
    virtual const char* what() const { return "processes"; }
    virtual bool can_shard() const { return false; }  // see Sharding in lib/optimizer.h

    // Makes what the constructor has left for later: whatever may fail on one rank only. Where it throws,
    // this rank can still abort() the others.
    virtual void connect() {}

    // x[i] becomes the sum of all ranks' x[i].
    virtual void all_reduce(double*, size_t) {}
    // The same, started and not waited for: x must not be touched until finish(), which waits for all that
    // was started. The sum may be computed in the background.
    virtual void start_all_reduce(float*, size_t) {}
    virtual void finish() {}
    // all (world x bytes) becomes what the ranks have in `mine`, rank after rank.
    virtual void all_gather(void* all, const void* mine, size_t bytes) { memcpy(all, mine, bytes); }
    // Copies rank 0's data to all ranks.
    virtual void broadcast(void*, size_t) {}
    // Returns when all ranks have called it.
    virtual void barrier() {}
    // Because this rank cannot go on: prints `line`, unless it is empty or another rank has told the reason
    // already, and ends the other ranks. The program's exit code is `code`.
    virtual void abort(int /*code*/, const std::string& /*line*/) {}
    // What to do when a rank dies: added to the line that names it.
    virtual void set_hint(const std::string&) {}
    // The command line that starts `command` in as many processes, in the way that these were started.
    virtual std::string start_again(const std::string& command) const { return command; }

    void broadcast(std::string& text) {
        uint64_t bytes = text.size();
        broadcast(&bytes, sizeof bytes);
        text.resize(bytes);
        broadcast(&text[0], bytes);
    }
    // Every rank's x.
    template <class T>
    std::vector<T> gather(const T& x) {
        std::vector<T> all((size_t)world);
        all_gather(all.data(), &x, sizeof x);
        return all;
    }
};

// A process that trains alone. Throws Error, with what to do `instead`, where it was started as one of
// several.
inline std::unique_ptr<Comm> one_rank(const char* instead) {
    for (const char* size : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"})
        if (const char* n = getenv(size); n && atoi(n) > 1)
            fail("started as one of %s processes (%s); %s", n, size, instead);
    return std::make_unique<Comm>();
}

// The ranks of the CPU trainer. lib/comm_mpi.cpp, which `make MPI=1` links into it, replaces this by MPI's.
#ifndef ARAPOET_MPI
__attribute__((weak)) std::unique_ptr<Comm> open_comm() {
    return one_rank("make MPI=1 builds a train_gpt2 for several");
}
#endif
