// prompt.h - how a poem begins: what the trainers and the sampler give a model to go on from.
#pragma once

#include <string>
#include <vector>

#include "data/clean.h"
#include "tokenizer/tokenizer.h"

struct Prompt {
    std::string text;         // cleaned as the training text was
    std::vector<int> tokens;  // end-of-text, tags, the text
    size_t tag_count = 0;
    // What stays in sight of the model when the text has become longer than its context
    std::vector<int> tags() const { return {tokens.begin() + 1, tokens.begin() + 1 + (ptrdiff_t)tag_count}; }
};

// Where the recipe is that goes with a tokenizer.
inline std::string recipe_beside(const std::string& tokenizer_path) {
    return dirname_of(tokenizer_path) + "/recipe.txt";
}

// The prompt for a text and tags (COLUMN=VALUE,COLUMN=VALUE). The text is cleaned by the recipe that is
// beside the tokenizer, so that vowel signs and other forms of letters may be written; white space at its end
// is kept, because it says whether a word, a hemistich or a verse is complete. An Error names a letter that
// the model does not know.
inline Prompt make_prompt(const Tokenizer& tokenizer, const std::string& tokenizer_path,
                          const std::string& text, const std::string& tags) {
    Prompt p = {text, tokenizer.beginning(tags)};
    p.tag_count = p.tokens.size() - 1;
    if (std::string path = recipe_beside(tokenizer_path); file_exists(path)) {
        const Recipe recipe = Recipe::load(path);
        Cleaner clean(recipe);
        const bool detected = recipe.hemistich_separator != "auto";
        if (const size_t bad = utf8::find_invalid(text); bad != utf8::VALID)
            fail("invalid UTF-8 at byte %zu (0x%02X)", bad, (unsigned)(unsigned char)text[bad]);
        p.text = clean(Separator(detected ? recipe.hemistich_separator : "tab").apply(text));
        const std::map<uint32_t, size_t> removed = clean.removed();
        utf8::for_each(text, [&](uint32_t c, size_t offset) {
            if (removed.count(c) && is_letter(c) && !is_mark(c))
                fail("character %s at byte %zu is not among those that the poems have", utf8::name(c).c_str(),
                     offset);
        });
        size_t end = text.size();
        while (end && strchr(" \t\r\n", text[end - 1])) end--;
        const std::string_view rest = std::string_view(text).substr(end);
        if (rest.find_first_of("\r\n") != rest.npos) p.text += '\n';
        else if (!rest.empty()) p.text += rest.find('\t') == rest.npos ? ' ' : '\t';
        if (p.text == " " || p.text == "\t" || p.text == "\n") p.text.clear();
    }
    for (int t : tokenizer.encode(p.text)) p.tokens.push_back(t);
    return p;
}
