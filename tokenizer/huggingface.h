// huggingface.h - our tokenizers in Hugging Face's files: what convert_gpt2 to-hf writes and export_tokenizer
// reads.
//
//     for (auto& [name, content] : huggingface::files_of(tokenizer, 1024, "tokenizer.bin")) ...
//
// tokenizer.json (the format of the tokenizers library) describes a pipeline. Added tokens are cut out of the
// text; the pre-tokenizer cuts what is between them into pieces; the model turns each piece into tokens; the
// post-processor adds special tokens; the decoder turns tokens into text.
//
// A character tokenizer becomes a WordLevel model, a table of whole pieces, whose pre-tokenizer makes every
// code point a piece. It names an unknown token that the table lacks, so a character without a token is an
// error there as it is here. (A BPE model without merges would skip such a character without a word.)
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace huggingface {

using Json = nlohmann::ordered_json;

// GPT-2's files spell the bytes of a token with visible characters: a printable byte of Latin-1 as this
// character, the k-th of the other bytes as U+0100 + k. The character of each byte.
inline const std::vector<uint32_t>& characters_of_bytes() {
    static const std::vector<uint32_t> characters = [] {
        std::vector<uint32_t> c(256);
        uint32_t others = 0;
        for (uint32_t b = 0; b < 256; b++) {
            bool visible = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
            c[b] = visible ? b : 0x100 + others++;
        }
        return c;
    }();
    return characters;
}
inline std::string spelled(const std::string& bytes) {
    std::string s;
    for (char b : bytes) utf8::append(s, characters_of_bytes()[(unsigned char)b]);
    return s;
}
// Decodes a spelled token to its bytes; false if it contains a character that spells no byte.
inline bool bytes_of(const std::string& token, std::string* bytes) {
    static const std::map<uint32_t, char> byte_of = [] {
        std::map<uint32_t, char> m;
        for (uint32_t b = 0; b < 256; b++) m[characters_of_bytes()[b]] = (char)b;
        return m;
    }();
    bytes->clear();
    bool all = true;
    utf8::for_each(token, [&](uint32_t c, size_t) {
        auto it = byte_of.find(c);
        all = all && it != byte_of.end();
        if (all) *bytes += it->second;
    });
    return all;
}

// The pre-tokenizer of a character tokenizer. '.' would leave line breaks out.
inline Json every_character() {
    return {{"type", "Split"},
            {"pattern", {{"Regex", "[\\s\\S]"}}},
            {"behavior", "Isolated"},
            {"invert", false}};
}

inline bool is_special(const Tokenizer& t, int id) {
    return id == t.eot() || (t.kind() == Tokenizer::CHARACTERS && id >= t.first_tag());
}
// Is the token one of those that tokenizer.json lists as added?
inline bool is_listed(const Tokenizer& t, int id) {
    return is_special(t, id) || (t.kind() == Tokenizer::BYTE_BPE && t.is_added(id));
}
inline std::string name_of(const Tokenizer& t, int id) {
    const bool plain = t.kind() == Tokenizer::CHARACTERS || is_listed(t, id);
    return plain ? t.bytes(id) : spelled(t.bytes(id));
}

// All tokens with their numbers. Keys are appended unchecked: operator[] would search all earlier ones for
// each.
inline Json vocabulary(const Tokenizer& t, const std::string& where) {
    Json vocab = Json::object();
    std::set<std::string> names;
    for (int id = 0; id < t.vocab_size(); id++) {
        const std::string name = name_of(t, id);
        const bool valid = utf8::find_invalid(name) == utf8::VALID;
        if (!valid || !names.insert(name).second)
            fail("%s: token %d %s cannot be written to tokenizer.json: its name is %s", where.c_str(), id,
                 utf8::quote(t.bytes(id)).c_str(), valid ? "taken" : "not UTF-8");
        vocab.get_ref<Json::object_t&>().push_back({name, id});
    }
    return vocab;
}
inline Json added_tokens(const Tokenizer& t) {
    Json added = Json::array();
    for (int id = 0; id < t.vocab_size(); id++)
        if (is_listed(t, id))
            added.push_back({{"id", id},
                             {"content", name_of(t, id)},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", !is_special(t, id)},
                             {"special", is_special(t, id)}});
    return added;
}
inline Json bpe_model(const Tokenizer& t, const Json& vocab) {
    Json merges = Json::array();
    for (int id = 0; id < t.vocab_size(); id++)
        if (auto [left, right] = t.parts(id); left >= 0)
            merges.push_back(name_of(t, left) + " " + name_of(t, right));
    return {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", ""},
            {"end_of_word_suffix", ""},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", merges}};
}
// The post-processor that puts what begins a poem before a text, or before each of two.
inline Json template_processor(const Tokenizer& t) {
    Json special_tokens = Json::object(), single = Json::array(), pair;
    for (int id : t.beginning("")) {
        const std::string name = name_of(t, id);
        special_tokens[name] = {{"id", name}, {"ids", Json::array({id})}, {"tokens", Json::array({name})}};
        single.push_back({{"SpecialToken", {{"id", name}, {"type_id", 0}}}});
    }
    pair = single;
    auto text = [](const char* which) { return Json{{"Sequence", {{"id", which}, {"type_id", 0}}}}; };
    pair.push_back(text("A"));
    pair.insert(pair.end(), single.begin(), single.end());
    pair.push_back(text("B"));
    single.push_back(text("A"));
    return {{"type", "TemplateProcessing"},
            {"single", single},
            {"pair", pair},
            {"special_tokens", special_tokens}};
}

// tokenizer.json. `where` names the tokenizer in error messages.
//
// encode() of the result returns the tokens that Tokenizer::encode does, after those that begin a poem in
// sample_gpt2: end-of-text, and for a model with tags one of each kind. With add_special_tokens=False it
// returns them alone. As with any tokenizer of that library, a text that spells end-of-text or a tag is
// encoded as it, where Tokenizer::encode takes the spelling for text.
inline Json tokenizer_json(const Tokenizer& t, const std::string& where) {
    const bool characters = t.kind() == Tokenizer::CHARACTERS;
    const Json vocab = vocabulary(t, where);
    const Json word_level = {{"type", "WordLevel"}, {"vocab", vocab}, {"unk_token", "<unknown>"}};
    const Json byte_level = {{"type", "ByteLevel"},
                             {"add_prefix_space", t.add_prefix_space()},
                             {"trim_offsets", true},
                             {"use_regex", true}};
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", added_tokens(t)},
            {"normalizer", nullptr},
            {"pre_tokenizer", characters ? every_character() : byte_level},
            {"post_processor", template_processor(t)},
            {"decoder", characters ? Json{{"type", "Fuse"}} : byte_level},
            {"model", characters ? word_level : bpe_model(t, vocab)}};
}

// The names and contents of the files that transformers needs to load the tokenizer of a model whose context
// is maxT tokens long.
inline std::vector<std::pair<std::string, std::string>> files_of(const Tokenizer& t, int maxT,
                                                                 const std::string& where) {
    const Json json = tokenizer_json(t, where);
    const std::string& eot = t.bytes(t.eot());
    Json special = {{"bos_token", eot}, {"eos_token", eot}, {"pad_token", eot}};
    Json config = {{"add_prefix_space", t.add_prefix_space()},
                   {"clean_up_tokenization_spaces", false},
                   // Without this list transformers adds token_type_ids, and GPT-2's class adds their
                   // embeddings to those of the tokens.
                   {"model_input_names", {"input_ids", "attention_mask"}},
                   {"model_max_length", maxT},
                   {"padding_side", "left"},
                   {"tokenizer_class", "PreTrainedTokenizerFast"}};
    config.update(special);
    return {{"tokenizer.json", json.dump(2) + "\n"},
            {"tokenizer_config.json", config.dump(2) + "\n"},
            {"special_tokens_map.json", special.dump(2) + "\n"}};
}

}  // namespace huggingface
