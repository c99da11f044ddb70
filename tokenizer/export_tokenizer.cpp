// export_tokenizer.cpp - makes a tokenizer file from a published model's folder.
//
//     ./export_tokenizer gpt2/ gpt2.bin
//
// Reads tokenizer.json, or vocab.json and merges.txt, in Hugging Face's format, and eos_token and
// add_prefix_space from tokenizer_config.json. Refuses a tokenizer that tokenizer.h would not reproduce
// exactly: it must be byte-level BPE like GPT-2's, and its merges must be those that tokenizer.h finds from
// the order of the tokens; or a character tokenizer that convert_gpt2 to-hf wrote.
//
// If config.json says that the model has more tokens, because the rows of its embedding are padded, the
// tokenizer gets unused ones: <|unused500|> and so on, which no text is encoded as.
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "lib/flags.h"
#include "lib/io.h"
#include "lib/run_folder.h"
#include "tokenizer/huggingface.h"

namespace exporter {

using Json = nlohmann::json;
using utf8::quote;

// A published tokenizer, with tokens spelled as in the folder's files (see huggingface::bytes_of).
struct Published {
    std::string vocab_path, merges_path;
    std::vector<std::string> tokens;  // by id
    std::unordered_map<std::string, int> id_of;
    std::vector<std::pair<std::string, std::string>> merges;
    std::vector<std::string> merge_places;  // "line 5" or "merge 3", for messages
    std::set<int> special;                  // spelled as plain text; no text is encoded as them
    std::set<int> added;      // spelled as plain text too, and cut out of a text before it is cut into pieces
    bool characters = false;  // it is a character tokenizer
    size_t unused = 0;        // how many of the last tokens are padding
    bool add_prefix_space = false;
    int eot = 0;
};

inline Json read_json(const std::string& path) {
    Reader in(path);
    try {
        Json j = Json::parse(in.rest());
        if (!j.is_object()) fail("%s: is a JSON %s, wanted an object", path.c_str(), j.type_name());
        return j;
    } catch (const Json::exception& e) {
        fail("%s: is not JSON: %s", path.c_str(), e.what());
    }
}
// The object's member, or JSON null if it is missing.
inline const Json& member(const Json& j, const char* name) {
    static const Json none;
    auto it = j.is_object() ? j.find(name) : j.end();
    return it == j.end() ? none : *it;
}

// ---------------------------------------------------------------------------------------------
// Reading the folder

class Folder {
  public:
    explicit Folder(const std::string& dir) : dir_(dir) {}

    Published read() {
        const std::string json = dir_ + "/tokenizer.json", vocab = dir_ + "/vocab.json",
                          merges = dir_ + "/merges.txt";
        if (file_exists(json)) {
            read_tokenizer_json(json);
        } else if (file_exists(vocab)) {
            p_.vocab_path = vocab, p_.merges_path = merges;
            add_vocab(read_json(vocab));
            read_merges(merges);
        } else {
            fail("%s: has neither tokenizer.json nor vocab.json and merges.txt", dir_.c_str());
        }
        for (const char* name : {"/special_tokens_map.json", "/tokenizer_config.json"})
            if (const std::string path = dir_ + name; file_exists(path))
                configs_.push_back({path, read_json(path)});
        if (const std::string path = dir_ + "/added_tokens.json"; file_exists(path)) {
            const Json added = read_json(path);
            for (auto& [token, id] : added.items()) add_listed(token, id, path);
        }
        read_config();
        finish();
        return std::move(p_);
    }

  private:
    int id(const Json& j, const std::string& token, const std::string& path) {
        constexpr int64_t most = (1 << bpe::Merges::ID_BITS) - 1;
        if (!j.is_number_integer() || j.get<int64_t>() < 0 || j.get<int64_t>() > most)
            fail("%s: the id of %s is %s, wanted 0 to %d", path.c_str(), quote(token).c_str(),
                 quote(j.dump()).c_str(), (int)most);
        return j.get<int>();
    }
    void add_vocab(const Json& vocab) {
        if (!vocab.is_object()) fail("%s: has no vocabulary", p_.vocab_path.c_str());
        for (auto& [token, number] : vocab.items())
            add_token(token, id(number, token, p_.vocab_path), p_.vocab_path);
    }
    void add_token(const std::string& token, int id, const std::string& path) {
        auto [other, is_new] = by_id_.insert({id, token});
        if (!is_new)
            fail("%s: %s and %s both have id %d", path.c_str(), quote(other->second).c_str(),
                 quote(token).c_str(), id);
        p_.id_of[token] = id;
    }
    // Adds a token beyond the vocabulary, or notes that one of the vocabulary is such; returns its id.
    int add_beyond(const std::string& token, const Json& number, const std::string& path) {
        int i = id(number, token, path);
        auto known = p_.id_of.find(token);
        if (known == p_.id_of.end()) add_token(token, i, path);
        else if (known->second != i)
            fail("%s: %s has id %d, but in the vocabulary it has %d", path.c_str(), quote(token).c_str(), i,
                 known->second);
        return i;
    }
    // A token of added_tokens.json, which does not say which of its tokens are special. Those are special
    // that special_tokens_map.json or tokenizer_config.json names.
    void add_listed(const std::string& token, const Json& number, const std::string& path) {
        int i = add_beyond(token, number, path);
        if (p_.special.count(i) || p_.added.count(i)) return;
        bool special = false;
        for (const auto& [config, j] : configs_) {
            const Json &flags = member(member(j, "added_tokens_decoder"), std::to_string(i).c_str()),
                       &flag = member(flags, "special");
            auto names = [&](const Json& t) { return (t.is_object() ? member(t, "content") : t) == token; };
            for (const char* field :
                 {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"})
                special = special || names(member(j, field));
            for (const char* list : {"additional_special_tokens", "extra_special_tokens"})
                for (const Json& t : member(j, list)) special = special || names(t);
            special = special || flag == true;
            check_flags(token, flags, config);
        }
        (special ? p_.special : p_.added).insert(i);
    }
    // The ways of cutting added tokens out of a text that tokenizer.h lacks are Errors.
    void check_flags(const std::string& token, const Json& flags, const std::string& path) {
        for (const char* flag : {"lstrip", "rstrip", "single_word"})
            if (member(flags, "special") == false && member(flags, flag) == true)
                fail("%s: %s of the added token %s is true, wanted false", path.c_str(), flag,
                     quote(token).c_str());
    }

    void read_merges(const std::string& path) {
        Reader in(path);
        const std::string text = in.rest();
        size_t number = 0;
        for (size_t i = 0, end; i < text.size(); i = end + 1) {
            end = std::min(text.find('\n', i), text.size());
            std::string line = text.substr(i, end - i), place = strf("line %zu", ++number);
            if (!line.empty() && line.back() == '\r') line.pop_back();
            if (line.empty() || (number == 1 && line.compare(0, 9, "#version:") == 0)) continue;
            add_merge(line, place);
        }
    }
    void add_merge(const std::string& line, const std::string& place) {
        size_t space = line.find(' ');
        if (space == 0 || space == std::string::npos || space + 1 == line.size() || space != line.rfind(' '))
            fail("%s: %s: %s is not two tokens with a space between them", p_.merges_path.c_str(),
                 place.c_str(), quote(line).c_str());
        p_.merges.push_back({line.substr(0, space), line.substr(space + 1)}),
            p_.merge_places.push_back(place);
    }

    void read_tokenizer_json(const std::string& path) {
        p_.vocab_path = p_.merges_path = path;
        const Json j = read_json(path), &model = member(j, "model"), &type = member(model, "type");
        auto refuse = [&](const char* what, const Json& found, const char* wanted) {
            fail("%s: %s is %s, wanted %s", path.c_str(), what, quote(found.dump()).c_str(), wanted);
        };
        if (type == "WordLevel") return read_characters(j, path);
        if (!type.is_null() && type != "BPE") refuse("model.type", type, "\"BPE\"");
        if (const Json& n = member(j, "normalizer"); !n.is_null()) refuse("normalizer", n, "none");
        for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                 "byte_fallback", "ignore_merges"}) {
            const Json& v = member(model, name);
            if (!v.is_null() && v != "" && v != false && v != 0) refuse(name, v, "none");
        }
        const Json *pre = &member(j, "pre_tokenizer"), &list = member(*pre, "pretokenizers");
        if (list.is_array() && list.size() == 1) pre = &list[0];
        if (member(*pre, "type") != "ByteLevel") refuse("pre_tokenizer", *pre, "ByteLevel");
        if (member(*pre, "use_regex") == false) refuse("pre_tokenizer.use_regex", false, "true");
        p_.add_prefix_space = member(*pre, "add_prefix_space") == true;

        add_vocab(member(model, "vocab"));
        const Json& merges = member(model, "merges");
        if (!merges.is_array()) fail("%s: model.merges is missing", path.c_str());
        for (const Json& m : merges) {
            std::string place = strf("merge %zu", p_.merges.size());
            if (m.is_string()) add_merge(m.get<std::string>(), place);
            else if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string())
                p_.merges.push_back({m[0], m[1]}), p_.merge_places.push_back(place);
            else refuse(place.c_str(), m, "two tokens");
        }
        const Json& added = member(j, "added_tokens");
        if (!added.is_null() && !added.is_array()) refuse("added_tokens", added, "a list");
        std::set<bool> normalized;
        for (const Json& a : added) {
            const Json &content = member(a, "content"), &special = member(a, "special");
            if (!content.is_string()) refuse("an added token", a, "one with content");
            const std::string token = content.get<std::string>();
            int i = add_beyond(token, member(a, "id"), path);
            (special == false ? p_.added : p_.special).insert(i);
            check_flags(token, a, path);
            if (special == false) normalized.insert(member(a, "normalized") != false);
        }
        // Two kinds, of which one is cut out before the other.
        if (normalized.size() > 1)
            fail("%s: some added tokens are normalized and some are not, wanted all or none", path.c_str());
    }
    // A character tokenizer, in the form in which convert_gpt2 to-hf writes it.
    void read_characters(const Json& j, const std::string& path) {
        const Json& pre = member(j, "pre_tokenizer");
        if (const Json wanted = huggingface::every_character(); pre != wanted)
            fail("%s: pre_tokenizer of a WordLevel model is %s, wanted %s", path.c_str(),
                 quote(pre.dump(), 400).c_str(), wanted.dump().c_str());
        if (!member(j, "normalizer").is_null()) fail("%s: has a normalizer, wanted none", path.c_str());
        p_.characters = true;
        add_vocab(member(member(j, "model"), "vocab"));
    }

    // Reads eos_token and add_prefix_space. tokenizer_config.json overrides the other files,
    // as in transformers.
    void read_config() {
        std::string eos = "<|endoftext|>", from = dir_;
        for (const auto& [path, j] : configs_) {
            const Json &token = member(j, "eos_token"), &space = member(j, "add_prefix_space");
            const Json& text = token.is_object() ? member(token, "content") : token;
            if (text.is_string()) eos = text.get<std::string>(), from = path;
            else if (!text.is_null())
                fail("%s: eos_token is %s, wanted a string", path.c_str(), quote(text.dump()).c_str());
            if (space.is_boolean()) p_.add_prefix_space = space.get<bool>();
            else if (!space.is_null())
                fail("%s: add_prefix_space is %s, wanted true or false", path.c_str(),
                     quote(space.dump()).c_str());
        }
        auto it = p_.id_of.find(eos);
        if (it == p_.id_of.end())
            fail("%s: end-of-text %s is not in %s", from.c_str(), quote(eos).c_str(), p_.vocab_path.c_str());
        p_.special.insert(p_.eot = it->second), p_.added.erase(p_.eot);
    }

    // Lists the tokens by id; checks that no id is missing.
    void finish() {
        for (auto& [id, token] : by_id_) {
            if (id != (int)p_.tokens.size())
                fail("%s: no token has id %zu, but %s has %d", p_.vocab_path.c_str(), p_.tokens.size(),
                     quote(token).c_str(), id);
            p_.tokens.push_back(token);
        }
        const std::string config = dir_ + "/config.json";
        if (!file_exists(config) || p_.characters) return;
        const Json j = read_json(config), &size = member(j, "vocab_size");
        if (!size.is_number_unsigned() || size > 1 << bpe::Merges::ID_BITS)
            return;  // convert_gpt2 refuses it
        while (p_.tokens.size() < size.get<size_t>()) {
            p_.special.insert((int)p_.tokens.size());
            p_.tokens.push_back(strf("<|unused%zu|>", p_.tokens.size()));
            p_.unused++;
        }
    }

    std::string dir_;
    std::vector<std::pair<std::string, Json>> configs_;  // the path and content of each, as far as they exist
    std::map<int, std::string> by_id_;
    Published p_;
};

// ---------------------------------------------------------------------------------------------
// Checking and writing

// The bytes of all tokens by id. A special token, or one with a character that spells no byte, is plain text.
inline std::vector<std::string> token_bytes(const Published& p) {
    std::vector<std::string> tokens(p.tokens.size());
    for (size_t i = 0; i < tokens.size(); i++) {
        bool plain = p.special.count((int)i) || p.added.count((int)i);
        if (plain || !huggingface::bytes_of(p.tokens[i], &tokens[i])) tokens[i] = p.tokens[i];
        if (tokens[i].empty() || tokens[i].size() > 255)
            fail("%s: token %zu %s has %zu bytes, a tokenizer file holds 1 to 255", p.vocab_path.c_str(), i,
                 quote(p.tokens[i]).c_str(), tokens[i].size());
    }
    return tokens;
}

// For each token, the two tokens that the published merge of it names; -1 and -1 if no merge makes it. The
// ids must ascend in the order of the merges.
inline std::vector<std::pair<int, int>> published_parts(const Published& p) {
    const char* merges = p.merges_path.c_str();
    std::vector<std::pair<int, int>> parts(p.tokens.size(), {-1, -1});
    int previous = -1;
    for (size_t m = 0; m < p.merges.size(); m++) {
        const auto& [left, right] = p.merges[m];
        const std::string whole = left + right;
        auto id = [&](const std::string& token) {
            auto it = p.id_of.find(token);
            if (it == p.id_of.end())
                fail("%s: %s: %s is not in the vocabulary: are these the merges of another tokenizer?",
                     merges, p.merge_places[m].c_str(), quote(token).c_str());
            return it->second;
        };
        int l = id(left), r = id(right), made = id(whole);
        if (p.special.count(made) || p.added.count(made))
            fail("%s: %s makes the %s token %s", merges, p.merge_places[m].c_str(),
                 p.special.count(made) ? "special" : "added", quote(whole).c_str());
        if (made <= previous)
            fail("%s: %s makes token %d %s, an earlier one token %d: ids must ascend in merge order", merges,
                 p.merge_places[m].c_str(), made, quote(whole).c_str(), previous);
        previous = made;
        parts[(size_t)made] = {l, r};
    }
    return parts;
}

// A character tokenizer; an Error if its tokens are not in the order that tokenizer.h gives them.
inline Tokenizer make_characters(const Published& p) {
    std::string text;
    std::vector<std::string> tags;
    for (int i = 0; i < (int)p.tokens.size(); i++)
        if (i < p.eot) text += p.tokens[(size_t)i];
        else if (i > p.eot) tags.push_back(p.tokens[(size_t)i]);
    Tokenizer tok = Tokenizer::characters(text, tags);
    for (int i = 0; i < (int)p.tokens.size(); i++)
        if (i >= tok.vocab_size() || tok.bytes(i) != p.tokens[(size_t)i])
            fail(
                "%s: token %d is %s, wanted characters in the order of their code points, then "
                "<|endoftext|>, then tags",
                p.vocab_path.c_str(), i, quote(p.tokens[(size_t)i]).c_str());
    return tok;
}

// The tokenizer; an Error if its merges, found from the order of the tokens, are not the published ones.
inline Tokenizer make_tokenizer(const Published& p) {
    if (p.characters) return make_characters(p);
    const char* merges = p.merges_path.c_str();
    std::vector<std::string> tokens = token_bytes(p);
    const std::vector<std::pair<int, int>> parts = published_parts(p);
    Tokenizer tok = Tokenizer::byte_bpe(std::move(tokens), p.eot, p.add_prefix_space, p.vocab_path,
                                        {p.added.begin(), p.added.end()});
    size_t m = 0;
    for (int i = 0; i < tok.vocab_size(); i++) {
        const bool is_merge = parts[(size_t)i].first >= 0, would_be = tok.parts(i).first >= 0;
        const std::string token = quote(p.tokens[(size_t)i]);
        if (is_merge && tok.parts(i) != parts[(size_t)i])
            fail("%s: %s never makes token %d %s: earlier merges turn its bytes into other tokens", merges,
                 p.merge_places[m].c_str(), i, token.c_str());
        if (!is_merge && would_be)
            fail(
                "%s: no merge makes token %d %s, but %s and %s would: the merges are incomplete or belong to "
                "another tokenizer",
                merges, i, token.c_str(), quote(p.tokens[(size_t)tok.parts(i).first]).c_str(),
                quote(p.tokens[(size_t)tok.parts(i).second]).c_str());
        m += is_merge;
    }
    return tok;
}

inline int export_main(int argc, char** argv) {
    std::vector<std::string> words;
    Flags f("export_tokenizer", "makes a tokenizer file from a published model's folder");
    f.positional(&words, "DIR out.bin");
    f.epilogue(
        "DIR holds tokenizer.json, or vocab.json and merges.txt, as Hugging Face publishes them.\n"
        "next: ./prepare_data poems.csv --tokenizer out.bin -o poems\n");
    f.parse(argc, argv);
    if (words.size() != 2) throw UsageError("wanted two names: ./export_tokenizer DIR out.bin; see --help");
    const Published p = Folder(words[0]).read();
    const Tokenizer tok = make_tokenizer(p);
    trainer::BeforeTraining lock(words[1]);
    tok.save(words[1]);
    printf("%s: %s tokens, %s merges, end-of-text %d %s%s\n", words[1].c_str(),
           commas((uint64_t)tok.vocab_size()).c_str(), commas(p.merges.size()).c_str(), tok.eot(),
           quote(tok.bytes(tok.eot())).c_str(), tok.add_prefix_space() ? ", adds a space before a text" : "");
    if (p.unused) printf("%zu of the tokens are unused: the model has more than the tokenizer\n", p.unused);
    return 0;
}

}  // namespace exporter

#ifndef ARAPOET_NO_MAIN
int main(int argc, char** argv) {
    return run_main("export_tokenizer", [&] { return exporter::export_main(argc, argv); });
}
#endif
