// prompt.h - how a poem begins: what the trainers and the sampler give a model to go on from.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/clean.h"
#include "tokenizer/tokenizer.h"

struct Prompt {
    std::string text;         // cleaned as the training text was
    std::vector<int> tokens;  // end-of-text, tags, the text
    size_t tag_count = 0;
    // The tags, which generate() puts before the rest of a text that no longer fits into the context.
    std::vector<int> tags() const { return {tokens.begin() + 1, tokens.begin() + 1 + (ptrdiff_t)tag_count}; }
};

// Where the recipe is that goes with a tokenizer.
inline std::string recipe_beside(const std::string& tokenizer_path) {
    return dirname_of(tokenizer_path) + "/recipe.txt";
}
// The recipe itself; none where there is no such file. An Error says what is wrong with the file.
inline std::optional<Recipe> recipe_for(const std::string& tokenizer_path) {
    const std::string path = recipe_beside(tokenizer_path);
    if (!file_exists(path)) return {};
    return Recipe::load(path);
}

// Where a model's tokenizer is, if no flag says otherwise.
inline std::string tokenizer_beside(const std::string& model) { return dirname_of(model) + "/tokenizer.bin"; }
// The tokenizer in the file `path`, for a model with V tokens.
inline Tokenizer tokenizer_for(const std::string& model, int V, const std::string& path) {
    if (!file_exists(path)) fail("%s: tokenizer not found; name it with --tokenizer FILE", path.c_str());
    Tokenizer tokenizer = Tokenizer::load(path);
    if (tokenizer.vocab_size() != V)
        fail("%s: has %d tokens, %s has a vocabulary of %d", path.c_str(), tokenizer.vocab_size(),
             model.c_str(), V);
    return tokenizer;
}

// A prompt's text, cleaned by the recipe. White space or a separator of hemistichs at its end is kept, as a
// space, a TAB or a newline, because it says whether a word, a hemistich or a verse is complete. An Error
// names a letter that the poems do not have.
inline std::string clean_prompt(const std::string& text, const Recipe& recipe) {
    if (const size_t bad = utf8::find_invalid(text); bad != utf8::VALID)
        fail("invalid UTF-8 at byte %zu (0x%02X)", bad, (unsigned)(unsigned char)text[bad]);
    const bool known = recipe.hemistich_separator != "auto";
    const Separator separator(known ? recipe.hemistich_separator : "tab");
    // Separators stand before a letter. So one is put at the end, and taken away.
    const std::string alef = "\u0627";
    std::string divided = separator.apply(text + alef);
    divided.resize(divided.size() - alef.size());

    Cleaner clean(recipe);
    std::string cleaned = clean(divided);
    const std::map<uint32_t, size_t> removed = clean.removed();
    utf8::for_each(text, [&](uint32_t c, size_t offset) {
        if (removed.count(c) && is_lost_letter(c))
            fail("character %s at byte %zu is not among those that the poems have", utf8::name(c).c_str(),
                 offset);
    });
    if (cleaned.empty()) return "";
    const std::string_view rest = std::string_view(divided).substr(divided.find_last_not_of(" \t\r\n") + 1);
    if (rest.find_first_of("\r\n") != rest.npos) cleaned += '\n';
    else if (!rest.empty()) cleaned += rest.find('\t') == rest.npos ? ' ' : '\t';
    return cleaned;
}

// The prompt for a text, after `beginning`: end-of-text and tags, as Tokenizer::beginning() returns them. The
// text is cleaned by the recipe, so that vowel signs and other forms of letters may be written; without one
// it is taken as it is. An Error names a letter that the model does not know.
inline Prompt make_prompt(const Tokenizer& tokenizer, const std::optional<Recipe>& recipe,
                          const std::string& text, const std::vector<int>& beginning) {
    Prompt p = {text, beginning, beginning.size() - 1};
    if (recipe) p.text = clean_prompt(text, *recipe);
    for (int t : tokenizer.encode(p.text)) p.tokens.push_back(t);
    return p;
}

// The prompt for a program's flags: --prompt is `text`, and `tags_flag` is `tags`, COLUMN=VALUE,COLUMN=VALUE.
// T: the model's context. A UsageError names the flag whose value the model cannot take.
inline Prompt prompt_of_flags(const Tokenizer& tokenizer, const std::optional<Recipe>& recipe,
                              const std::string& text, const char* tags_flag, const std::string& tags,
                              size_t T) {
    std::vector<int> beginning;
    try {
        beginning = tokenizer.beginning(tags);
    } catch (const Error& e) {
        throw UsageError(strf("%s: %s", tags_flag, e.what()));
    }
    Prompt p;
    try {
        p = make_prompt(tokenizer, recipe, text, beginning);
    } catch (const Error& e) {
        throw UsageError(strf("--prompt: %s", e.what()));
    }
    if (p.tokens.size() > T)
        throw UsageError(
            strf("--prompt has %zu tokens with end-of-text and tags, the context takes %zu: wanted at most "
                 "%zu of text, found %zu",
                 p.tokens.size(), T, T - std::min(T, beginning.size()), p.tokens.size() - beginning.size()));
    return p;
}
