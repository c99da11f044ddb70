// sample_gpt2.cu - sample_gpt2.cpp with the model of train_gpt2.cu: writes poems on a GPU. It includes both.
// With SERVE_GPT2 it is dev/demo/serve_gpt2.cpp on a GPU.
#define ARAPOET_NO_MAIN
#define SAMPLE_ON_GPU
#include "train_gpt2.cu"

namespace {

// A decoder with a model of its own.
class OwningDecoder final : public Decoder {
  public:
    OwningDecoder(std::unique_ptr<gpu::GPT2> model, size_t N)
        : model_(std::move(model)), decoder_(*model_, N, (size_t)model_->cfg.maxT) {}
    size_t sequences() const override { return decoder_.sequences(); }
    size_t capacity() const override { return decoder_.capacity(); }
    size_t length(size_t s = 0) const override { return decoder_.length(s); }
    void truncate(size_t s, size_t length) override { decoder_.truncate(s, length); }
    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        return decoder_.append(which, tokens, n);
    }

  private:
    std::unique_ptr<gpu::GPT2> model_;
    gpu::Decoder decoder_;
};

// Makes the GPU with nvidia-smi's number `device` this process's own; -1: CUDA's first. Throws Error where
// there is none.
void take_gpu(int device) {
    if (device >= 0) gpu::use_device(device);
    gpu::require_gpu();
}

}  // namespace

std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype dtype) {
    const Precision precision{dtype};
    const size_t need = gpu::GPT2::memory_need(file.cfg, 0, 0, false, 0, precision).total(),
                 have = gpu::GPT2::memory_available();
    if (need > have)
        fail("the model needs %s of GPU memory, %s are free; %s", human_bytes((double)need).c_str(),
             human_bytes((double)have).c_str(), gpu::WITHOUT_GPU);
    auto model = std::make_unique<gpu::GPT2>(file.cfg, 0, 0, false, 0, precision);
    model->each_piece(PARAMS, [&](float* p, size_t n) { file.read(p, n); });
    return std::make_unique<OwningDecoder>(std::move(model), N);
}

#ifdef SERVE_GPT2
#include "dev/demo/serve_gpt2.cpp"
#else
#include "sample_gpt2.cpp"
#endif
