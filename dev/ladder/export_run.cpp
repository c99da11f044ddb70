// export_run.cpp - writes the initial weights and the batches of a run of ./train_gpt2, for check_torch.py.
//
//     ./export_run --data out/data --preset char --batch_size 4 --steps 100 -o out/check
//
// writes OUT/init.bin, a model file as in lib/gpt2.h, and OUT/batches.bin, a token file as in
// data/dataloader.h with STEPS x B windows of T + 1 tokens: a window's first T tokens are the inputs, its
// last T the targets. With the same data, sizes and seed, ./train_gpt2 starts with these weights and trains
// on these windows in this order.
#define ARAPOET_NO_MAIN
#include "train_gpt2.cpp"
#include "lib/trainer.h"

int main(int argc, char** argv) {
    return run_main("export_run", [&]() -> int {
        std::string data = "out/data", out = "out/check", preset = "char";
        int depth = 0, heads = 0, channels = 0, seq_len = 0, batch_size = 4, steps = 100;
        uint64_t seed = 1337;
        Flags f("export_run", "writes the initial weights and the batches of a run of ./train_gpt2");
        f.add("data", "", &data, "DIR", "folder made by ./prepare_data");
        f.add("out", "o", &out, "DIR", "folder for init.bin and batches.bin");
        f.add("preset", "", &preset, "NAME", "the model's sizes, as for ./train_gpt2")
            .choices(preset_names());
        f.add("depth", "", &depth, "L", "layers, instead of the preset's").range(1, 4096).unset(0);
        f.add("heads", "", &heads, "NH", "heads, instead of the preset's").range(1, 4096).unset(0);
        f.add("channels", "", &channels, "C", "width, instead of the preset's").range(1, 1 << 17).unset(0);
        f.add("seq_len", "t", &seq_len, "T", "tokens of context, instead of the preset's")
            .range(1, 1 << 20)
            .unset(0);
        f.add("batch_size", "b", &batch_size, "B", "sequences per step").range(1, 1 << 24);
        f.add("steps", "", &steps, "N", "number of batches").range(1, INFINITY);
        f.add("seed", "", &seed, "N", "as for ./train_gpt2");
        f.parse(argc, argv);
        Config c = preset_config(preset);
        if (depth) c.L = depth;
        if (heads) c.NH = heads;
        if (channels) c.C = channels;
        if (seq_len) c.maxT = seq_len;
        c.V = Tokenizer::load(data + "/tokenizer.bin").vocab_size(), c.Vp = pad_vocab(c.V);
        check_config(c, "the model that the flags describe");
        make_dirs(out);
        cpu::GPT2 model(c, 0, 0, false);
        model.init_weights(seed);
        trainer::save_model(model, out + "/init.bin");

        TokenFile file(data + "/train.bin");
        size_t B = (size_t)batch_size, T = (size_t)c.maxT;
        TrainLoader loader(file, c.maxT, seed, true);
        std::vector<int> x(B * T), y(B * T);
        std::vector<uint16_t> windows;
        for (int step = 0; step < steps; step++) {
            loader.next(batch_size, x.data(), y.data());
            for (size_t b = 0; b < B; b++) {
                windows.insert(windows.end(), &x[b * T], &x[b * T] + T);
                windows.push_back((uint16_t)y[b * T + T - 1]);
            }
        }
        write_tokens(out + "/batches.bin", windows);
        printf("%s/init.bin: %s, %s parameters\n%s/batches.bin: %d batches of %d x (%zu + 1) tokens\n",
               out.c_str(), c.text().c_str(), commas(num_params(c)).c_str(), out.c_str(), steps, batch_size,
               T);
        return 0;
    });
}
