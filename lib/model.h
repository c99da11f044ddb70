// model.h - the contract: what lib/trainer.h asks of a model. cpu::GPT2 (train_gpt2.cpp) and gpu::GPT2
// (train_gpt2.cu) satisfy it; check_model() below proves it when a trainer is compiled.
//
// B sequences of T tokens, V vocabulary. tokens and targets (B,T) are int, sequence after sequence; tokens
// are in [0, V), targets in [0, V) or negative to be left out of the loss. The caller checks them, and keeps
// both in place until the call returns. Losses are in nats per token. Nothing may be called from two threads
// at once.
//
// Of the program and the machine:
//     PROGRAM, DEFAULT_DTYPE       the program's name; the numbers it computes with unless told otherwise
//     require_device()             throws Error where this machine cannot run it
//     set_threads(n)               threads of the CPU from now on; a GPU ignores it
//     device()                     one line on the machine, for people
//     peak_flops(precision)        what the machine can do at most
//     check_precision(precision)   throws UsageError, naming the flag, where it does not compute so
//     memory_available()           bytes that may still be taken
//     memory_need(config, B, T, trains, recompute, precision)
//                                  bytes that a model takes, by purpose; throws Error where sizes cannot be
//                                  addressed
//
// Of a model M(config, B, T, trains, recompute, precision): B x T is its largest batch, B = T = 0 a model
// that only generates; recompute is explained at Activations::place. The constructor takes all memory that
// memory_need says and throws Error where it cannot; afterwards a step allocates nothing.
//     dropout, seed                may be set between steps; they key the dropout masks
//     init_weights(seed)           initial_weights() of every tensor
//     forward(tokens, targets, B, T, pass)
//                                  the mean loss over the targets >= 0, without dropout (pass.train is
//                                  false); counted() tells how many there were. Not between accumulate() and
//                                  step().
//     accumulate(tokens, targets, B, T, pass)
//                                  adds the gradients and the loss of one micro-batch, both times
//                                  pass.grad_scale for each token, to those of the step; may return before
//                                  they are computed
//     step(adamw, t)               step number t, from 1, on what was accumulated. Where its loss or the
//                                  gradient's norm is not finite, parameters and moments stay as they are:
//                                  the model decides that where it computes the two. Returns the result of
//                                  step t, or of step t - 1 if step t is still being computed on a device;
//                                  StepResult::step says which. The next accumulate() begins a new step.
//     last_result()                waits for the step that was started last, and returns its result. The
//                                  trainer calls it before it reads the state, validates or generates.
//     each_piece(state, f)         a whole state out or in, in the model file's order, piece by piece:
//                                  f(pointer, number of floats). An f that takes const float* reads, one that
//                                  takes float* writes. The pointer is valid only during the call.
//     resumed(t)                   says that the state just loaded is that after step t
#pragma once

#include <type_traits>

#include "lib/gpt2.h"

// What one forward pass is for. Training keeps activations and applies dropout.
struct Pass {
    bool train = false;
    uint32_t step = 0;     // keys the dropout masks
    uint64_t seq0 = 0;     // number of the first sequence within the step's whole batch
    float grad_scale = 1;  // 1 / (tokens of the whole batch)
};

// AdamW's settings for one step. A gradient whose global norm exceeds grad_clip is scaled down to it; 0: no
// limit.
struct AdamW {
    float lr = 3e-4f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f, grad_clip = 0;
};

// What step number `step` found (0: no step yet): the mean loss of its batches, and the gradient's norm
// before clipping.
struct StepResult {
    double loss = 0, norm = 0;
    uint32_t step = 0;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
};

// What numbers a model computes with. On a GPU bf16 keeps fp32 master weights along with its bf16 parameters,
// unless told not to. On the CPU parameters stay fp32 and products round them, except in a model that only
// generates.
struct Precision {
    Dtype dtype = FP32;
    bool master_weights = true;
};

// Floating-point operations a second that a machine can do, and how that is known.
struct Peak {
    double flops;
    const char* source;
};

// Bytes that a model needs, by purpose.
struct MemoryNeed {
    size_t params = 0, grads = 0, optimizer = 0, activations = 0, scratch = 0;
    size_t total() const { return params + grads + optimizer + activations + scratch; }
};

// Compiles only where M satisfies the contract.
template <class M>
constexpr void check_model() {
    using std::declval;
    using std::is_same;
    struct Reads {
        void operator()(const float*, size_t) {}
    };
    const int* const tokens = nullptr;
    M* const m = nullptr;
    static_assert(std::is_constructible<M, const Config&, size_t, size_t, bool, int, Precision>::value,
                  "constructor");
    static_assert(is_same<decltype(M::device()), std::string>::value, "device()");
    static_assert(is_same<decltype(M::peak_flops(Precision())), Peak>::value, "peak_flops()");
    static_assert(is_same<decltype(M::memory_available()), size_t>::value, "memory_available()");
    static_assert(is_same<decltype(M::memory_need(declval<const Config&>(), 0, 0, true, 0, Precision())),
                          MemoryNeed>::value,
                  "memory_need()");
    static_assert(is_same<decltype(M::require_device(), M::set_threads(0), M::check_precision(Precision())),
                          void>::value,
                  "of the machine");
    static_assert(is_same<decltype(m->forward(tokens, tokens, 0, 0, Pass())), double>::value, "forward()");
    static_assert(is_same<decltype(m->counted()), size_t>::value, "counted()");
    static_assert(is_same<decltype(m->accumulate(tokens, tokens, 0, 0, Pass())), void>::value,
                  "accumulate()");
    static_assert(is_same<decltype(m->step(AdamW(), 1)), StepResult>::value, "step()");
    static_assert(is_same<decltype(m->last_result()), StepResult>::value, "last_result()");
    static_assert(is_same<decltype(m->each_piece(PARAMS, Reads())), void>::value, "each_piece()");
    static_assert(is_same<decltype(m->init_weights(0), m->resumed(0)), void>::value,
                  "init_weights(), resumed()");
    static_assert(is_same<decltype(M::dropout), float>::value && is_same<decltype(M::seed), uint64_t>::value,
                  "settings");
    static_assert(is_same<decltype(M::DEFAULT_DTYPE), const Dtype>::value, "DEFAULT_DTYPE");
    static_assert(is_same<decltype(M::PROGRAM), const char* const>::value, "PROGRAM");
    (void)tokens, (void)m;
}
