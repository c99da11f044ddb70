// comm_mpi.cpp - the ranks of the CPU trainer when it is built with MPI=1: those of MPI.
//
// On Ctrl-C or SIGTERM, OpenMPI's mpirun tells its ranks to stop, and kills them a second later. For a model
// whose step or save takes longer: mpirun --mca odls_base_sigkill_timeout 600. By default it also binds a
// rank to one core (two ranks) or socket (more): --bind-to none lets ranks of several machines use all cores.
#define OMPI_SKIP_MPICXX  // its C++ interface is not used, and warns
#define ARAPOET_MPI
#include <mpi.h>

#include <algorithm>

#include "lib/comm.h"

namespace {

class MpiComm final : public Comm {
  public:
    MpiComm() {
        int threads;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &threads);
        if (threads < MPI_THREAD_FUNNELED) fail("this MPI does not allow threads, which the trainer uses");
        MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &world);
        MPI_Comm host;
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host);
        MPI_Comm_size(host, &on_host), MPI_Comm_free(&host);
        if (world == 1) one_rank("the launcher is not that of the MPI that this program was built with");
    }
    ~MpiComm() override { MPI_Finalize(); }

    void all_reduce(double* x, size_t n) override {
        MPI_Allreduce(MPI_IN_PLACE, x, (int)n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    }
    // In parts, since MPI counts in int, and since a large sum is faster in parts.
    void start_all_reduce(float* x, size_t n) override {
        constexpr size_t PART = (size_t)1 << 24;
        for (size_t i = 0; i < n; i += PART) {
            requests_.emplace_back();
            MPI_Iallreduce(MPI_IN_PLACE, x + i, (int)std::min(PART, n - i), MPI_FLOAT, MPI_SUM,
                           MPI_COMM_WORLD, &requests_.back());
        }
        // OpenMPI makes progress only in calls like this one.
        int done;
        MPI_Testall((int)requests_.size(), requests_.data(), &done, MPI_STATUSES_IGNORE);
        if (done) requests_.clear();
    }
    void finish() override {
        MPI_Waitall((int)requests_.size(), requests_.data(), MPI_STATUSES_IGNORE);
        requests_.clear();
    }
    void all_gather(void* all, const void* mine, size_t bytes) override {
        MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD);
    }
    using Comm::broadcast;
    void broadcast(void* data, size_t bytes) override {
        MPI_Bcast(data, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
    }
    void barrier() override { MPI_Barrier(MPI_COMM_WORLD); }
    void abort(int code, const std::string& line) override {
        fprintf(stderr, "%s", line.c_str());
        MPI_Abort(MPI_COMM_WORLD, code);
    }
    std::string start_again(const std::string& command) const override {
        return world > 1 ? strf("mpirun -n %d %s", world, command.c_str()) : command;
    }

  private:
    std::vector<MPI_Request> requests_;
};

}  // namespace

std::unique_ptr<Comm> open_comm() { return std::make_unique<MpiComm>(); }
