// model.h - the contract between the trainer in lib/trainer.h and a model. cpu::GPT2 (train_gpt2.cpp) and
// gpu::GPT2 (train_gpt2.cu) fulfil it; check_model() below checks the functions' types when a trainer is
// compiled. The trainer also asks for a Decoder(model, N, context), the interface in lib/sampler.h.
//
// B sequences of T tokens, V vocabulary. tokens and targets (B,T) are int, sequence after sequence. Tokens
// are in [0, V), targets in [0, V), or negative to be left out of the loss. The caller checks them, and keeps
// both in place until the call returns. Losses are in nats per token. Functions must not be called from two
// threads at once.
//
// Static functions, about the program and the machine:
//     PROGRAM, DEFAULT_DTYPE       the program's name; the numbers it computes with by default
//     require_device()             throws Error if the program cannot run on this machine
//     set_threads(n)               the CPU's threads from now on; a GPU ignores it
//     device()                     one line about the machine, for people
//     peak_flops(precision)        the most operations a second that the machine can do
//     check_precision(precision)   throws UsageError, naming the flag, if it cannot compute so
//     open_ranks(options)          the Comm (lib/comm.h) of the processes that train together; throws
//                                  UsageError, naming the flag, for what the program cannot do
//     memory_available(on_host)    bytes of memory that are free for each of so many ranks on this machine
//     memory_need(config, B, T, trains, recompute, precision, ranks, optimizer)
//                                  bytes that a model needs, by purpose; throws Error if sizes cannot be
//                                  addressed
//
// A model M(config, B, T, trains, recompute, precision, ranks, optimizer): B x T is its largest batch;
// B = T = 0 makes a model that only generates. recompute, 0 to 3, is how much backward computes again instead
// of keeping it.
// The constructor takes all memory that memory_need() says, and throws Error if it cannot. After that, a step
// allocates nothing.
//     cfg                          the sizes
//     dropout, seed                may be set between steps; they determine the dropout masks
//     ranks, optimizer             as the constructor was given them
//     init_weights(seed)           initial_weights() of every tensor
//     forward(tokens, targets, B, T, pass)
//                                  the mean loss over the targets >= 0, without dropout (pass.train is
//                                  false). counted() tells how many targets that were. Must not be called
//                                  between accumulate() and step().
//     accumulate(tokens, targets, B, T, pass)
//                                  adds the gradients and the loss of one micro-batch to those of the step,
//                                  each token's share multiplied by pass.grad_scale. It may return before
//                                  they are computed. pass.last says that no other follows in this step:
//                                  ranks then begin to add up their gradients.
//     step(settings, t)            takes step number t, from 1, with what all ranks accumulated. If
//                                  settings.takes() refuses the loss or the norm, parameters and what the
//                                  optimizer keeps do not change; the model decides that where it computes
//                                  the two. Returns the result of step t; or of step t - 1, if a device still
//                                  computes step t and is not waited for. StepResult::step tells which. The
//                                  next accumulate() begins a new step.
//     last_result()                waits for the step that was started last, and returns its result. It is
//                                  called before the state is read, and before forward() and generating.
//     each_piece(state, f)         passes a whole state to f, in the model file's order, piece by piece:
//                                  f(pointer, number of floats). ADAM_M, ADAM_V and MUON_M have only the
//                                  elements of the parameters that AdamW, or Muon, updates. An f that takes
//                                  const float* reads; one that takes float* writes. The pointer is valid
//                                  only during the call.
//     each_range(state, f)         the same for what this rank holds of a state, which may be a part:
//                                  f(pointer, number of floats, number in the file of the first one)
//     has(state)                   whether the model has it. MASTER, MUON_M: see State in lib/gpt2.h.
//     sharded()                    whether each rank holds only a part of the optimizer's arrays, so that
//                                  each_piece() cannot pass them. All ranks then save and load together.
//     resumed(t)                   says that the state just loaded is the one after step t
#pragma once

#include <type_traits>

#include "lib/comm.h"
#include "lib/optimizer.h"

// What one forward pass is for. Training keeps activations and applies dropout.
struct Pass {
    bool train = false;
    uint32_t step = 0;     // keys the dropout masks
    uint64_t seq0 = 0;     // number of the first sequence within the step's whole batch
    float grad_scale = 1;  // 1 / (tokens of the whole batch)
    bool last = true;      // the step's last micro-batch
};

// The numbers that a model computes with. On a GPU, bf16 parameters are accompanied by fp32 master weights,
// unless master_weights is false. On the CPU parameters stay fp32 and products round them to bf16, except in
// a model that only generates, which keeps them in bf16.
struct Precision {
    Dtype dtype = FP32;
    bool master_weights = true;
    bool deterministic = false;  // a GPU's products are chosen by a rule instead of by their speed
};

// The processes that train together, and how much each of them keeps.
struct Ranks {
    Comm* comm = nullptr;  // null: this process trains alone
    int zero_stage = 0;
    int world() const { return comm ? comm->world : 1; }
    bool several() const { return world() > 1; }
    Sharding sharding() const { return {world(), comm ? comm->rank : 0, zero_stage}; }
};

// The most floating-point operations a second that a machine can do, and how that number is known.
struct Peak {
    double flops;
    std::string source;  // "measured", and what else is to be said of it
};

// Bytes that a model needs, by purpose.
struct MemoryNeed {
    size_t params = 0, grads = 0, optimizer = 0, activations = 0, scratch = 0;
    size_t total() const { return params + grads + optimizer + activations + scratch; }
};

// Compiles only if M has the members above, with these types.
template <class M>
constexpr void check_model() {
    using std::declval;
    using std::is_same;
    struct Reads {
        void operator()(const float*, size_t) {}
        void operator()(const float*, size_t, size_t) {}
    };
    const int* const tokens = nullptr;
    M* const m = nullptr;
    static_assert(std::is_constructible<M, const Config&, size_t, size_t, bool, int, Precision, Ranks,
                                        Optimizer>::value,
                  "constructor");
    static_assert(is_same<decltype(M::device()), std::string>::value, "device()");
    static_assert(is_same<decltype(M::peak_flops(Precision())), Peak>::value, "peak_flops()");
    static_assert(is_same<decltype(M::open_ranks(RankOptions())), std::unique_ptr<Comm>>::value,
                  "open_ranks()");
    static_assert(is_same<decltype(M::ranks), const Ranks>::value, "ranks");
    static_assert(is_same<decltype(M::optimizer), const Optimizer>::value, "optimizer");
    static_assert(is_same<decltype(M::memory_available(1)), size_t>::value, "memory_available()");
    static_assert(
        is_same<decltype(M::memory_need(declval<const Config&>(), 0, 0, true, 0, Precision(), Ranks(), MUON)),
                MemoryNeed>::value,
        "memory_need()");
    static_assert(is_same<decltype(M::require_device()), void>::value, "require_device()");
    static_assert(is_same<decltype(M::set_threads(0)), void>::value, "set_threads()");
    static_assert(is_same<decltype(M::check_precision(Precision())), void>::value, "check_precision()");
    static_assert(is_same<decltype(m->forward(tokens, tokens, 0, 0, Pass())), double>::value, "forward()");
    static_assert(is_same<decltype(m->counted()), size_t>::value, "counted()");
    static_assert(is_same<decltype(m->accumulate(tokens, tokens, 0, 0, Pass())), void>::value,
                  "accumulate()");
    static_assert(is_same<decltype(m->step(StepSettings(), 1)), StepResult>::value, "step()");
    static_assert(is_same<decltype(m->last_result()), StepResult>::value, "last_result()");
    static_assert(is_same<decltype(m->each_piece(PARAMS, Reads())), void>::value, "each_piece()");
    static_assert(is_same<decltype(m->each_range(PARAMS, Reads())), void>::value, "each_range()");
    static_assert(is_same<decltype(m->has(MASTER)), bool>::value, "has()");
    static_assert(is_same<decltype(m->sharded()), bool>::value, "sharded()");
    static_assert(is_same<decltype(m->init_weights(0)), void>::value, "init_weights()");
    static_assert(is_same<decltype(m->resumed(0)), void>::value, "resumed()");
    static_assert(is_same<decltype(M::cfg), const Config>::value, "cfg");
    static_assert(is_same<decltype(M::dropout), float>::value && is_same<decltype(M::seed), uint64_t>::value,
                  "settings");
    static_assert(is_same<decltype(M::DEFAULT_DTYPE), const Dtype>::value, "DEFAULT_DTYPE");
    static_assert(is_same<decltype(M::PROGRAM), const char* const>::value, "PROGRAM");
    (void)tokens, (void)m;
}
