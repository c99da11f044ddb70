// page.js - the page on which people write poems with a model that ./serve_gpt2 serves.
//
// A poem is a list of units. A unit is a token of the model, or the text that it was given:
//     {text, others, chosen}
// text: what it adds to the poem; a TAB stands between hemistichs, a newline ends a verse.
// others: the likeliest tokens there, [[token, log probability], ...]; null for given text.
// chosen: the reader put it in place of the model's token.
//
// Text from the server and the reader enters the page only as text nodes.
'use strict';

// The limits of the server's POST /v1/completions for `max_tokens` and `verses`.
const MOST_TOKENS = 16384, MOST_VERSES = 100;

// ---------------------------------------------------------------------------------------------
// The page's words

const WORDS = {  // in English, in Arabic; \u2068 and \u2069 keep Arabic letters apart in a line from the left
  title: ['Arapoet', 'أرابويت'],
  motto: ['You begin a poem, the model goes on.', 'تبدأ أنت القصيدة، ويُتمّها النموذج.'],
  otherLanguage: ['العربية', 'English'],

  prompt: ['Beginning', 'المطلع'],
  promptHint: ['A word, a hemistich, some verses, or nothing. A line is a verse; * divides its hemistichs.',
               'كلمة أو شطر أو أبيات، أو لا شيء. كل سطر بيت، وعلامة * تفصل بين الشطرين.'],
  promptKeys: ['Ctrl+Enter writes.', 'للكتابة اضغط Ctrl+Enter.'],
  model: ['Model', 'النموذج'],
  compare: ['Side by side with', 'جنبًا إلى جنب مع'],
  model2: ['Second model', 'النموذج الثاني'],
  tag_poem_meter: ['Metre', 'البحر'],
  tag_poet_name: ['Poet', 'الشاعر'],
  tag_poem_theme: ['Theme', 'الغرض'],
  any: ['any', 'دون تحديد'],
  other: ['other', 'غير ذلك'],
  verses: ['Verses in all', 'عدد الأبيات'],
  versesHint: ['0: the model ends the poem', '0: يختم النموذج القصيدة متى شاء'],
  rhyme: ['Rhyme', 'القافية'],
  rhymeAuto: ['as in verse 1', 'كالبيت الأول'],
  rhymeLetters: ['letter(s)', 'على حرف أو حروف'],
  rhymeNone: ['none', 'دون اشتراط قافية'],
  letters: ['Rhyme letter or letters', 'حرف الروي أو حروفه'],
  lettersMissing: ['Type the letter or letters here.', 'اكتب هنا حرف الروي أو حروفه.'],
  advanced: ['More settings', 'إعدادات أخرى'],
  temperature: ['Temperature', 'الحرارة'],
  temperatureHint: ['0: always the likeliest letter; 2: wild', '0: أرجح حرف دائمًا، 2: جموح'],
  repetition: ['Repetition penalty', 'عقوبة التكرار'],
  repetitionHint: ['1: none', '1: بلا عقوبة'],
  topK: ['Top-k', 'أرجح k'],
  topKHint: ['only the k likeliest; 0: all', 'أرجح k من الحروف فقط، 0: كلها'],
  topP: ['Top-p', 'مجموع p'],
  topPHint: ['keeps the likeliest letters until their probabilities sum to this; 1: all',
             'يُبقي أرجح الحروف إلى أن يبلغ مجموع احتمالاتها هذا العدد، 1: كلها'],
  seed: ['Seed', 'البذرة'],
  seedHint: ['The same number gives the same poem. Empty: a new one each time.',
             'العدد نفسه يعطي القصيدة نفسها. إن تُرك فارغًا فعدد جديد كل مرة.'],
  write: ['Write', 'اكتب'],
  stop: ['Stop', 'أوقف'],
  another: ['Another', 'غيرها'],

  empty: ['The poem will stand here.', 'هنا تُكتب القصيدة.'],
  // What became of a poem, by its state.
  writing: ['Writing…', 'يكتب…'],
  done: ['', ''],  // is seen; screen readers are told that it `ended`
  length: ['The longest text allowed was reached.', 'بلغ النص أقصى طول مسموح به.'],
  stopped: ['Stopped.', 'توقّف.'],
  cut: ['The connection broke here.', 'انقطع الاتصال هنا.'],
  failed: ['', ''],
  ended: ['The poem has ended.', 'انتهت القصيدة.'],

  busy: ['The server is busy. Next try in {n} s…', 'الخادم مشغول. المحاولة التالية بعد {n} ث…'],
  lost: ['The server does not answer. Your poems are still here.', 'الخادم لا يجيب. قصائدك باقية هنا.'],
  retry: ['Try again', 'حاول ثانيةً'],
  refused: ['The server says: ', 'يقول الخادم: '],
  fault: ["This page failed. The browser's console says why.",
          'حدث خلل في هذه الصفحة. سببه في وحدة تحكم المتصفح.'],
  full: [`A poem has ${MOST_VERSES} verses at most, and this one has them.`,
         `أقصى طول للقصيدة ${MOST_VERSES} بيت، وقد بلغته هذه.`],
  caption: ['{model}, seed {seed}', '{model}، البذرة {seed}'],
  redraws: ['Attempts discarded for the rhyme: {n}.', 'محاولات أُعيدت لأجل القافية: {n}.'],
  unrhymed: ['Verses not rhyming in \u2068{letters}\u2069: {n}.', 'أبيات ليست على روي {letters}: {n}.'],
  rhymeKept: ['{n} of the verses keep the rhyme.', '{n} من الأبيات على القافية.'],
  wordsKnown: ['{n} of the words occur in the poems it learnt from.',
               '{n} من الكلمات وردت في القصائد التي تعلّم منها.'],
  longestRun: ['The longest run copied from the poems it learnt from has {n} characters:',
               'أطول ما نُقل بنصّه من القصائد التي تعلّم منها، وعدد حروفه {n}:'],
  wholeMeasured: ['Measured over the whole poem, including the beginning you gave it.',
                  'حُسب هذا على القصيدة كلها، بما فيها المطلع الذي كتبته.'],
  goOn: ['Go on from here', 'أكمل من هنا'],
  copy: ['Copy', 'انسخ'],
  text: ['Save as text', 'احفظ نصًّا'],
  picture: ['Save as picture', 'احفظ صورة'],
  reuse: ['Use its settings', 'استعمل إعداداتها'],
  copied: ['Copied.', 'نُسخت.'],
  notCopied: ['The browser does not allow copying.', 'المتصفح لا يسمح بالنسخ.'],
  notSaved: ['The browser cannot draw this picture.', 'لا يستطيع المتصفح رسم هذه الصورة.'],
  history: ['Earlier poems', 'قصائد سابقة'],
  remove: ['Remove: {poem}', 'احذف: {poem}'],

  choices: ['What else the model found likely', 'ما رجّحه النموذج غير ذلك'],
  letter: ['{letter}, {n}. Enter shows what else was likely.', '{letter}، {n}. اضغط Enter لترى غيره.'],
  letterAlone: ['{letter}. Enter shows what else was likely.', '{letter}. اضغط Enter لترى غيره.'],
  space: ['space', 'مسافة'],
  gap: ['second hemistich', 'الشطر الثاني'],
  newline: ['end of the verse', 'نهاية البيت'],
  end: ['end of the poem', 'نهاية القصيدة'],
  piece: ['part of a letter', 'جزء من حرف'],
};

const $ = id => document.getElementById(id);
const storage = {
  get(key) {
    try { return JSON.parse(localStorage.getItem('arapoet.' + key)); } catch { return null; }
  },
  set(key, value) {  // returns whether there was room, and the browser allows it
    try {
      localStorage.setItem('arapoet.' + key, JSON.stringify(value));
      return true;
    } catch {
      return false;
    }
  },
};
let language = storage.get('language') || (/^ar\b/i.test(navigator.language) ? 'ar' : 'en');

// The words for a key in the page's language; {name} in them becomes values.name.
function word(key, values = {}) {
  return WORDS[key][language === 'ar' ? 1 : 0].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function percent(p) {
  const format = new Intl.NumberFormat(language === 'ar' ? 'ar-u-nu-latn' : 'en', {style: 'percent'});
  return p > 0 && p < 0.005 ? '< ' + format.format(0.01) : format.format(p);
}

// A new element. `word` among its properties is the key of its text; children are elements or strings.
function element(tag, {word: key, ...properties} = {}, ...children) {
  const e = Object.assign(document.createElement(tag), properties);
  if (key) {
    e.dataset.word = key;
    e.textContent = word(key);
  }
  e.append(...children);
  return e;
}

function button(properties, ...children) {
  return element('button', {type: 'button', ...properties}, ...children);
}

function setLanguage(to) {
  language = to;
  storage.set('language', to);
  document.documentElement.lang = to;
  document.documentElement.dir = to === 'ar' ? 'rtl' : 'ltr';
  document.title = word('title');
  for (const e of document.querySelectorAll('[data-word]')) e.textContent = word(e.dataset.word);
  $('language').textContent = word('otherLanguage');
  $('language').lang = to === 'ar' ? 'en' : 'ar';
  $('letters').setAttribute('aria-label', word('letters'));
  $('model2').setAttribute('aria-label', word('model2'));
  closeChoices();
  for (const p of panels) {
    p.drawNotes();
    p.setCurrent(p.list.querySelector('[tabindex]'));
  }
  drawHistory();
}

// ---------------------------------------------------------------------------------------------
// The server

// The server refused a request. param: the field at fault, or null.
class Refusal extends Error {
  constructor({message, param}) {
    super(message);
    this.param = param || null;
  }
}

// The server does not answer, or the connection broke.
class Lost extends Error {}

// For promises of fetch and of what it gives: their errors mean a lost server, others a fault of this script.
function lost(error) {
  throw new Lost(error.message);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener('abort', () => { clearTimeout(timer); reject(signal.reason); });
  });
}

// The answer to a request. While the server has too much to do the request is repeated; calls onBusy(seconds
// until the next try). Throws Refusal, or Lost where there is no server.
async function post(path, body, signal, onBusy) {
  for (let tries = 1;; tries++) {
    const response = await fetch(path, {
      method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body), signal,
    }).catch(lost);
    if (response.ok) return response;
    if (response.status === 429 && tries < 20) {
      const seconds = Number(response.headers.get('Retry-After')) || 2;
      onBusy?.(seconds);
      await pause(seconds, signal);
      continue;
    }
    const answer = await response.json().catch(() => ({}));
    throw new Refusal(answer.error || {message: `${response.status} ${response.statusText}`});
  }
}

// The objects of a stream of server-sent events, until its [DONE]. A loop over them that ends earlier, by a
// fault too, cancels the stream, so that the server does not go on writing for nobody.
async function* events(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  try {
    for (let rest = '';;) {
      const {done, value} = await reader.read().catch(lost);
      if (done) return;
      const blocks = (rest + decoder.decode(value, {stream: true})).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter(line => line.startsWith('data:'));
        const data = lines.map(line => line.slice(5)).join('\n');
        if (data.trim() === '[DONE]') return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // of a broken stream it only repeats the error
  }
}

// A token of byte-level BPE that is not whole letters.
const isPiece = token => token.includes('\ufffd') || token.startsWith('bytes:');

// Makes units of a stream's texts and tokens. Tokens that are pieces of a letter become one unit, with the
// alternatives of its first piece.
class Units {
  first = null;  // the alternatives of the first piece of a letter that is not complete yet

  *of(text, logprobs) {
    let at = 0;
    for (const [i, token] of (logprobs?.tokens || []).entries()) {
      const others = Object.entries(logprobs.top_logprobs?.[i] || {}).sort((a, b) => b[1] - a[1])
          .map(([other, logprob]) => [other, Math.round(1000 * logprob) / 1000]);
      const start = isPiece(token) ? -1 : text.indexOf(token, this.first ? at + 1 : at);
      if (start < 0) {
        this.first ||= others;
        continue;
      }
      if (start > at) yield {text: text.slice(at, start), others: this.first || []};
      this.first = null;
      yield {text: token, others};
      at = start + token.length;
    }
    if (at === text.length) return;
    yield {text: text.slice(at), others: this.first || []};
    this.first = null;
  }
}

// ---------------------------------------------------------------------------------------------
// Poems

const textOf = units => units.map(u => u.text).join('');
const versesOf = text => text.split('\n').filter(line => line.trim());
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// The reader writes * between hemistichs, the model a TAB. Other usual signs are understood.
const toPrompt = text => text.replace(/[ \t]*(?:\t|\*+|[/#…]|\.{3}| {3,})[ \t]*/g, '\t');
const fromPrompt = text => text.replace(/\t/g, ' * ');

const HISTORY = 20;  // poems kept
let history = storage.get('poems') || [];
let unstored = [];  // the oldest of them, for which the storage has no room; they last as long as the page

// Changes the history. The storage is read again, because the page in another tab may have changed it.
function changeHistory(change) {
  history = change([...storage.get('poems') || [], ...unstored]).slice(0, HISTORY);
  let stored = history.length;
  while (stored > 0 && !storage.set('poems', history.slice(0, stored))) stored--;
  if (!stored) storage.set('poems', []);
  unstored = history.slice(stored);
  drawHistory();
}

function remember(poem) {
  changeHistory(poems => [poem, ...poems.filter(p => p.id !== poem.id)]);
}

function forget(poem) {
  changeHistory(poems => poems.filter(p => p.id !== poem.id));
  ($('poems').querySelector('button') || $('write')).focus();
}

function drawHistory() {
  $('history').hidden = !history.length;
  $('poems').replaceChildren(...history.map(poem => {
    const title = versesOf(textOf(poem.units))[0]?.replace('\t', ' ') || '…';
    const show = button({className: 'show', lang: 'ar', dir: 'rtl', textContent: title});
    const remove = button({className: 'remove', textContent: '×'});
    remove.setAttribute('aria-label', word('remove', {poem: title}));
    show.onclick = () => {
      setPanels(1);
      panels[0].show(poem);
      panels[0].reveal();
    };
    remove.onclick = () => forget(poem);
    return element('li', {}, show, remove);
  }));
}

// ---------------------------------------------------------------------------------------------
// A poem in two columns

class Columns {
  constructor(list) {
    this.list = list;
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.verse = null;  // the verse that is being written
  }

  // Appends the unit with index i. Calls onVerse with the text of a verse that it ends.
  add(unit, i, onVerse) {
    for (const part of unit.text.split(/([\t\n])/)) {
      if (!part) continue;
      this.verse ||= this.startVerse();
      const span = element('span', {textContent: part === '\n' ? '' : part});
      span.classList.toggle('token', Boolean(unit.others?.length));
      span.classList.toggle('given', !unit.others);
      span.classList.toggle('chosen', Boolean(unit.chosen));
      span.dataset.unit = i;
      if (part === '\t' && !this.verse.second.isConnected) {
        span.classList.add('gap');
        this.verse.row.classList.remove('single');
        this.verse.row.append(span, this.verse.second);
        this.verse.now = this.verse.second;
      } else if (part === '\n') {
        span.classList.add('end');
        this.verse.row.append(span);
        onVerse?.(this.verse.row.textContent);
        this.endVerse();
      } else {
        this.verse.now.append(span);
      }
    }
  }

  startVerse() {
    const first = element('span', {className: 'hemistich'});
    const row = element('li', {className: 'verse'}, first);
    if (this.list.lastChild?.classList.contains('single')) row.classList.add('single');
    this.list.append(row);
    return {row, now: first, second: element('span', {className: 'hemistich second'})};
  }

  // Fills the columns' width with the words of finished verses, but not with those of hemistichs that are
  // much shorter than others, or longer than a line.
  endVerse() {
    if (this.verse) this.verse.row.classList.toggle('single', !this.verse.second.isConnected);
    this.verse = null;
    const all = [...this.list.querySelectorAll('.hemistich')];
    const line = parseFloat(getComputedStyle(this.list).lineHeight);
    const lines = all.filter(h => h.offsetHeight < 1.5 * line);
    const enough = 0.6 * Math.max(...lines.map(h => h.textContent.length));
    for (const h of all) h.classList.toggle('full', lines.includes(h) && h.textContent.length > enough);
  }

  // Marks verses, counted from 1.
  mark(numbers) {
    const rows = [...this.list.children].filter(row => row.textContent.trim());
    for (const [i, row] of rows.entries()) row.classList.toggle('unrhymed', numbers.includes(i + 1));
  }
}

// ---------------------------------------------------------------------------------------------
// A panel: a poem that a model writes, and what can be done with it

let panels = [], models = [];
let loadingModels = null;  // what a poem waits for that ended before the models were known

class Panel {
  poem = null;   // {id, request, units, kept: how many units it began with, state, rhyme, measures}
  abort = null;  // stops the poem that is being written
  current = null;  // the unit that Tab reaches

  constructor() {
    this.list = element('ol', {className: 'poem verse-face', lang: 'ar', dir: 'rtl'});
    this.columns = new Columns(this.list);
    this.empty = element('p', {className: 'empty', word: 'empty'});
    this.status = element('p', {className: 'status'});
    this.status.setAttribute('role', 'status');
    this.notes = element('ul', {className: 'notes'});
    this.caption = element('p', {className: 'caption'});
    const action = (key, run) => button({className: key, word: key, onclick: run});
    this.actions = element('div', {className: 'buttons', hidden: true},
        action('goOn', () => this.goOn()), action('copy', () => this.copy()),
        action('text', () => save(new Blob([this.plainText()], {type: 'text/plain'}), this.fileName('txt'))),
        action('picture', () => picture(this.list, blob => this.savePicture(blob))),
        action('reuse', () => useSettings(this.poem.request)));
    this.root = element('section', {className: 'panel'}, this.empty, this.list, this.status, this.notes,
        this.caption, this.actions);
    this.list.addEventListener('click', e => this.open(e.target));
    this.list.addEventListener('keydown', e => this.key(e));
  }

  // Writes a poem. kept: the units that the prompt consists of; id: the poem in the history that it replaces.
  async write(request, kept = [], id = Date.now() + Math.random()) {
    this.stop();
    const abort = this.abort = new AbortController();
    const units = kept.length ? [...kept] : request.prompt ? [{text: request.prompt, others: null}] : [];
    const poem = {id, request, units, kept: units.length, state: 'writing'}, before = this.poem;
    let failure = null;
    found(this);
    this.show(poem, false);
    this.reveal();
    try {
      await this.read(poem, abort.signal);
    } catch (error) {
      poem.state = abort.signal.aborted ? 'stopped' : error instanceof Lost ? 'cut' : 'failed';
      if (poem.state === 'failed') failure = error;
      if (poem.state === 'cut') showLost(this, () => this.write(request, kept, id));
    }
    // A beginning that has all the verses is a poem, too.
    const written = poem.units.length > (poem.state === 'done' ? 0 : poem.kept);
    if (written) remember(poem);
    if (this.abort !== abort) return;  // the next poem has begun
    this.abort = null;
    if (written) this.end();
    else this.show(before);
    if (failure) this.explain(failure);
    if (written && ['done', 'length', 'stopped'].includes(poem.state)) await this.measure(poem);
  }

  // Reads the poem's text from the server.
  async read(poem, signal) {
    const response = await post('/v1/completions', poem.request, signal,
                                seconds => { this.status.textContent = word('busy', {n: seconds}); });
    found(this);
    if (!models.length) loadingModels = loadModels();
    const units = new Units();
    for await (const event of events(response.body)) {
      signal.throwIfAborted();
      if (event.error) throw new Refusal(event.error);
      if (event.model) poem.request.model = event.model;  // not in the request where the models were unknown
      if (poem.units.length === poem.kept) this.setPrompt(poem, event.prompt);
      const choice = event.choices?.[0];
      for (const unit of units.of(choice?.text || '', choice?.logprobs)) {
        poem.units.push(unit);
        this.columns.add(unit, poem.units.length - 1, verse => this.sayVerse(verse));
        if (this.current === null && unit.others?.length) this.setCurrent(this.list.querySelector('.token'));
      }
      if (choice?.rhyme) poem.rhyme = choice.rhyme;
      if (choice?.finish_reason) poem.state = choice.finish_reason === 'length' ? 'length' : 'done';
    }
    if (poem.state === 'writing') throw new Lost('the stream ended too early');
  }

  // The server has cleaned the prompt. If that changed it, its units are one now.
  setPrompt(poem, prompt) {
    if (prompt === undefined || prompt === textOf(poem.units)) return;
    poem.units = prompt ? [{text: prompt, others: null}] : [];
    poem.kept = poem.units.length;
    this.drawPoem();
  }

  async measure(poem) {
    await loadingModels;
    if (!models.find(m => m.id === poem.request.model)?.measures || !textOf(poem.units).trim()) return;
    try {
      const response = await post('/v1/measures', {model: poem.request.model, text: textOf(poem.units)});
      poem.measures = await response.json();
    } catch {
      return;  // the poem stands without them
    }
    const same = p => p.id === poem.id && textOf(p.units) === textOf(poem.units);
    changeHistory(poems => poems.map(p => same(p) ? poem : p));
    if (this.poem !== poem || !panels.includes(this)) return;
    const said = this.notes.children.length;
    this.drawNotes();
    this.sayNotes(said);
  }

  stop() {
    this.abort?.abort();
    this.abort = null;
  }

  // Shows a poem that is finished, or about to be written; null: none.
  show(poem, finished = true) {
    if (finished) this.stop();
    clearErrors();
    closeChoices();
    $('live').replaceChildren();
    this.poem = poem;
    this.drawPoem();
    if (finished) return this.finish();
    this.drawNotes();
    updateButtons();
  }

  // Scrolls to the panel where it is out of sight.
  reveal() {
    const behavior = matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth';
    const {top} = this.root.getBoundingClientRect();
    if (top < 0 || top > 0.7 * innerHeight) this.root.scrollIntoView({behavior});
  }

  finish() {
    this.columns.endVerse();
    this.drawNotes();
    updateButtons();
  }

  // The poem has been written. Its last verse need not end with a newline.
  end() {
    const rest = this.columns.verse?.row.textContent;
    if (rest?.trim()) this.sayVerse(rest);
    this.finish();
    if (this.poem.state === 'done') announce(this, language, word('ended'));
    this.sayNotes(0);
  }

  sayVerse(verse) {
    announce(this, 'ar', verse.replace(/\t/g, '، '));
  }

  // Says the notes from number i on.
  sayNotes(i) {
    for (const note of [...this.notes.children].slice(i))
      announce(this, language, ...note.cloneNode(true).childNodes);
  }

  drawPoem() {
    this.columns.clear();
    this.current = null;
    for (const [i, unit] of (this.poem?.units || []).entries()) this.columns.add(unit, i);
    this.setCurrent(this.list.querySelector('.token'));
  }

  drawNotes() {
    const {poem} = this;
    this.empty.hidden = Boolean(poem);
    this.actions.hidden = !poem;
    this.status.textContent = poem ? word(poem.state) : '';
    this.caption.textContent = poem?.request.model ? word('caption', poem.request) : '';
    this.root.setAttribute('aria-label', this.caption.textContent);  // two panels have the same buttons
    const {rhyme, measures: m} = poem || {}, notes = [];
    if (rhyme?.redraws) notes.push([word('redraws', {n: rhyme.redraws})]);
    this.columns.mark(rhyme?.unrhymed || []);
    if (rhyme?.unrhymed?.length)
      notes.push([word('unrhymed', {n: rhyme.unrhymed.join(language === 'ar' ? '، ' : ', '),
                                    letters: rhyme.letters})]);
    if (m && m.rhyme_kept !== null) notes.push([word('rhymeKept', {n: percent(m.rhyme_kept)})]);
    if (m && m.words_known !== null) notes.push([word('wordsKnown', {n: percent(m.words_known)})]);
    if (m?.longest_run)
      notes.push([word('longestRun', {n: m.longest_run}),
                  element('q', {lang: 'ar', dir: 'rtl', textContent: m.longest_run_text.trim()})]);
    if (m && poem.units.some(unit => !unit.others && unit.text.trim())) notes.push([word('wholeMeasured')]);
    this.notes.replaceChildren(...notes.map(note => element('li', {}, ...note)));
  }

  // Says why there is no poem: at the field that is at fault, or here.
  explain(error) {
    if (error instanceof Refusal)
      return complain(fieldOf(error.param) || this.status, element('span', {word: 'refused'}),
                      element('bdi', {lang: 'en'}, error.message));
    console.error(error);
    complain(this.status, element('span', {word: 'fault'}));
  }

  // Tab reaches one of the model's letters, and arrows the others. Only that one is a button, so that a
  // screen reader reads the verses and not letter after letter.
  setCurrent(span, focus = false) {
    const old = this.list.querySelector('[tabindex]');
    for (const name of ['tabindex', 'role', 'aria-haspopup', 'aria-label']) old?.removeAttribute(name);
    if (!span) return;
    const unit = this.poem.units[this.current = Number(span.dataset.unit)];
    const p = unit.others.find(([token]) => token === unit.text)?.[1];
    span.setAttribute('tabindex', '0');
    span.setAttribute('role', 'button');
    span.setAttribute('aria-haspopup', 'dialog');
    const letter = tokenName(unit.text);
    span.setAttribute('aria-label', p === undefined ? word('letterAlone', {letter})
                                                    : word('letter', {letter, n: percent(Math.exp(p))}));
    if (focus) span.focus();
  }

  key(event) {
    const tokens = [...this.list.querySelectorAll('.token')].filter(
        (span, i, all) => i === 0 || all[i - 1].dataset.unit !== span.dataset.unit);
    const at = tokens.indexOf(event.target);
    if (at < 0) return;
    const to = {
      ArrowLeft: () => tokens[at + 1], ArrowRight: () => tokens[at - 1], Home: () => tokens[0],
      End: () => tokens.at(-1), ArrowDown: () => nearest(tokens, event.target, +1),
      ArrowUp: () => nearest(tokens, event.target, -1),
    }[event.key];
    if (to) this.setCurrent(to() || event.target, true);
    else if (event.key === 'Enter' || event.key === ' ') this.open(event.target);
    else return;
    event.preventDefault();
  }

  open(span) {
    if (!span.classList.contains('token')) return;
    this.setCurrent(span, true);
    openChoices(this, this.current, span);
  }

  // Goes on with another token in the place of unit i.
  choose(i, token) {
    const {request, units} = this.poem;
    const kept = [...units.slice(0, i), {text: token, others: units[i].others, chosen: true}];
    this.write({...request, prompt: textOf(kept)}, kept);
    this.setCurrent([...this.list.querySelectorAll('.token')].at(-1), true);
  }

  // Writes as many verses more as the form says, with the form's settings. The model stays, and so do the
  // tags where the form shows another model's.
  goOn() {
    clearErrors();
    const {id, units, state, request: {model, tags}} = this.poem, form = readForm();
    if (!form) return;
    const complete = state === 'done' && !textOf(units).endsWith('\n');
    const kept = complete ? [...units, {text: '\n', others: null}] : units;
    const prompt = textOf(kept), written = versesOf(prompt).length;
    if (isCount(form.verses)) {
      if (written >= MOST_VERSES) return complain(this.status, element('span', {word: 'full'}));
      form.verses = Math.min(written + form.verses, MOST_VERSES);
    }
    if (model !== $('model').value) form.tags = tags;
    this.write({...form, model, prompt}, kept, id);
  }

  another(seed) {
    if (this.poem) this.write({...this.poem.request, seed}, this.poem.units.slice(0, this.poem.kept));
  }

  plainText() {
    return textOf(this.poem.units).trim() + '\n';
  }

  fileName(extension) {
    return `poem-${this.poem.request.seed}.${extension}`;
  }

  savePicture(blob) {
    if (blob) save(blob, this.fileName('png'));
    else this.status.textContent = word('notSaved');
  }

  async copy() {
    const done = await navigator.clipboard?.writeText(this.plainText()).then(() => true, () => false)
        || copyBySelection(this.plainText());
    this.status.textContent = word(done ? 'copied' : 'notCopied');
  }
}

// The token in the next verse (step 1) or the one before it (step -1) that is nearest to a span.
function nearest(tokens, span, step) {
  const middle = e => e.getBoundingClientRect().left + e.getBoundingClientRect().width / 2;
  const rows = [...new Set(tokens.map(t => t.closest('.verse')))];
  const row = rows[rows.indexOf(span.closest('.verse')) + step];
  const distance = t => Math.abs(middle(t) - middle(span));
  return tokens.filter(t => t.closest('.verse') === row).sort((a, b) => distance(a) - distance(b))[0];
}

function setPanels(count) {
  for (const p of panels.slice(count)) {
    p.stop();
    found(p);
  }
  panels = panels.slice(0, count);
  while (panels.length < count) panels.push(new Panel());
  $('panels').replaceChildren(...panels.map(p => p.root));
}

// Tells screen readers strings and elements in a language.
function announce(panel, lang, ...parts) {
  const name = panels.length > 1 ? panel.poem.request.model + ': ' : '';
  $('live').append(element('p', {lang}, name, ...parts));
}

// ---------------------------------------------------------------------------------------------
// What else the model would have written

// A Map, because a token may be "constructor" or another name that every object has.
const TOKEN_NAMES = new Map([[' ', 'space'], ['\t', 'gap'], ['\n', 'newline']]);

function tokenName(token) {
  if (isPiece(token)) return word('piece');
  if (/^(<\|.*\|>)?$/.test(token)) return word('end');
  if (TOKEN_NAMES.has(token)) return word(TOKEN_NAMES.get(token));
  return token.replace(/[ \t]/g, '·').replace(/\n/g, '↵');
}

function openChoices(panel, index, span) {
  const box = $('choices'), unit = panel.poem.units[index];
  const rows = unit.others.map(([token, logprob]) => {
    const p = Math.exp(logprob);
    const name = element('span', {className: 'name', textContent: tokenName(token)});
    name.classList.toggle('verse-face', /[ء-ي]/.test(token));
    const bar = element('span', {className: 'bar'}, element('span'));
    bar.firstChild.style.width = 100 * p + '%';
    const row = button({className: 'choice'}, name, bar,
        element('span', {className: 'percent', dir: 'ltr', textContent: percent(p)}));
    row.disabled = isPiece(token) || tokenName(token) === word('end');
    if (token === unit.text) row.setAttribute('aria-current', 'true');
    row.onclick = () => {
      closeChoices();
      panel.choose(index, token);
    };
    return row;
  });
  box.replaceChildren(element('p', {className: 'title', textContent: word('choices')}), ...rows);
  box.setAttribute('aria-label', word('choices'));
  box.hidden = false;
  placeBeside(box, span);
  box.onkeydown = event => choicesKey(event, rows.filter(r => !r.disabled), span);
  (rows.find(r => !r.disabled) || box).focus({preventScroll: true});  // the box has the keys that close it
}

function choicesKey(event, rows, span) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) rows[(rows.indexOf(event.target) + step + rows.length) % rows.length]?.focus();
  else if (event.key === 'Escape' || event.key === 'Tab') {
    closeChoices();
    span.focus();
  } else return;
  event.preventDefault();
}

function placeBeside(box, span) {
  const r = span.getBoundingClientRect(), margin = 8;
  const left = Math.min(r.left + r.width / 2 - box.offsetWidth / 2,
                        document.documentElement.clientWidth - box.offsetWidth - margin);
  const below = r.bottom + margin + box.offsetHeight < innerHeight || r.top < box.offsetHeight + margin;
  box.style.left = Math.max(margin, left) + scrollX + 'px';
  box.style.top = (below ? r.bottom + margin : r.top - margin - box.offsetHeight) + scrollY + 'px';
}

function closeChoices() {
  $('choices').hidden = true;
}

// ---------------------------------------------------------------------------------------------
// Copying and saving

// For pages that are not served from this machine or over https, where navigator.clipboard is missing.
function copyBySelection(text) {
  const area = element('textarea', {value: text, className: 'unseen'});
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand('copy');
  area.remove();
  focused?.focus();
  return done;
}

function save(blob, name) {
  const link = element('a', {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// What all browsers can draw on: pixels of a canvas' side, and of its area.
const MOST_SIDE = 16384, MOST_AREA = 1 << 24;

// Draws a poem's verses, in the columns of the page and its colours, and gives the PNG file to `use`, or null
// where the browser cannot make one. Long lines and long poems are drawn smaller.
function picture(list, use) {
  const size = 44, line = 2.1 * size, margin = 2.4 * size, gap = 2 * size;
  const rows = [...list.children].map(row => [...row.querySelectorAll('.hemistich')].map(h => ({
    words: h.textContent.split(/\s+/).filter(Boolean), full: h.classList.contains('full'),
  })));
  const canvas = element('canvas'), ctx = canvas.getContext('2d');
  const font = size + 'px ' + getComputedStyle(list).fontFamily;
  ctx.font = font;
  const width = words => words.length ? ctx.measureText(words.join(' ')).width : 0;
  const two = rows.some(row => row.length > 1);
  const column = Math.ceil(Math.max(...rows.flat().map(h => width(h.words))));
  const across = 2 * margin + (two ? 2 * column + gap : column), down = 2 * margin + line * rows.length;
  const scale = Math.min(1, MOST_SIDE / across, MOST_SIDE / down, Math.sqrt(MOST_AREA / across / down));
  canvas.width = Math.max(1, scale * across);
  canvas.height = Math.max(1, scale * down);
  ctx.fillStyle = getComputedStyle(document.body).backgroundColor;
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = getComputedStyle(document.body).color;
  ctx.scale(scale, scale);
  Object.assign(ctx, {font, direction: 'rtl', textAlign: 'right', textBaseline: 'middle'});
  // A hemistich is drawn word by word, from the right; a full one has its words spread over the column.
  const draw = ({words, full}, right, y) => {
    const letters = words.reduce((sum, w) => sum + width([w]), 0);
    const spread = full && two && words.length > 1;
    const space = spread ? (column - letters) / (words.length - 1) : ctx.measureText(' ').width;
    for (const w of words) {
      ctx.fillText(w, right, y);
      right -= width([w]) + space;
    }
  };
  for (const [i, row] of rows.entries()) {
    const y = margin + line * (i + 0.5);
    if (row.length === 1) draw(row[0], (across + width(row[0].words)) / 2, y);
    else row.forEach((h, k) => draw(h, across - margin - k * (column + gap), y));
  }
  canvas.toBlob(use, 'image/png');
}

// ---------------------------------------------------------------------------------------------
// The form

const TOKENS_A_VERSE = 200;  // about 60 letters of at most two tokens each, and room for long verses
const FREE_VERSES = 20;  // there is room for so many where the model ends the poem
const NUMBERS = ['verses', 'temperature', 'repetition_penalty', 'top_k', 'top_p', 'seed'];

// The number that a reader typed, in Latin or Arabic digits. What is no number goes to the server as it is,
// whose answer then says what was wanted. So does what JSON has no number for, as 1e999 and Infinity.
function numberOf(text) {
  const latin = text.trim().replace(/[٠-٩]/g, d => d.charCodeAt(0) - 0x660).replace('٫', '.');
  return latin === '' ? undefined : Number.isFinite(Number(latin)) ? Number(latin) : text;
}

const isCount = number => Number.isInteger(number) && number >= 1;

// The form's request, or null after telling the reader what is missing. verses = 0: the model ends the poem.
// For an invalid number of verses max_tokens is still valid, so that the server's error is about `verses`.
function readForm() {
  const request = {prompt: toPrompt($('prompt').value), stream: true, logprobs: 8};
  for (const name of NUMBERS) request[name] = numberOf($(name).value);
  request.verses ??= 4;
  const verses = isCount(request.verses) ? request.verses : FREE_VERSES;
  request.max_tokens = Math.min(TOKENS_A_VERSE * verses, MOST_TOKENS);
  request.seed ??= newSeed();
  request.rhyme = $('rhyme').value;
  if (request.rhyme === 'letters') {
    request.rhyme = $('letters').value.trim();
    if (!request.rhyme) return complain($('letters'), element('span', {word: 'lettersMissing'}));
  }
  request.tags = {};
  for (const select of $('tags').querySelectorAll('select'))
    if (select.value) request.tags[select.name] = select.value;
  return request;
}

// Fills the form with a poem's request.
function useSettings(request) {
  $('prompt').value = fromPrompt(request.prompt);
  for (const name of NUMBERS) $(name).value = request[name] ?? '';
  const named = ['', 'auto'].includes(request.rhyme);
  $('rhyme').value = named ? request.rhyme : 'letters';
  $('letters').value = named ? '' : request.rhyme;
  $('letters').hidden = named;
  if (models.some(m => m.id === request.model)) $('model').value = request.model;
  drawTags();
  for (const select of $('tags').querySelectorAll('select')) select.value = request.tags[select.name] || '';
  $('advanced').open = true;
  $('prompt').focus();
}

// Selects for the chosen model's tags.
function drawTags() {
  const tags = models.find(m => m.id === $('model').value)?.tags || {};
  const fields = Object.entries(tags).map(([name, values]) => {
    const key = 'tag_' + name, id = 'tag-' + name;
    const label = WORDS[key] ? element('label', {htmlFor: id, word: key})
                                : element('label', {htmlFor: id, textContent: name.replace(/_/g, ' ')});
    const select = element('select', {id, name}, element('option', {value: '', word: 'any'}),
        ...values.map(value => value === 'other' ? element('option', {value, word: 'other'})
                                                 : element('option', {value, textContent: value})));
    return element('div', {className: 'field'}, label, select);
  });
  $('tags').replaceChildren(...fields);
  $('tags').hidden = !fields.length;
}

function drawModels() {
  const options = () => models.map(m => element('option', {value: m.id, textContent: m.id}));
  $('model').replaceChildren(...options());
  $('model2').replaceChildren(...options());
  $('model2').selectedIndex = 1;
  $('model-field').hidden = $('compare-field').hidden = models.length < 2;
  drawTags();
}

// The control for a parameter of the interface, if the form shows one.
function fieldOf(name) {
  if (name === 'rhyme' && !$('letters').hidden) return $('letters');
  if (name === 'tags') return $('tags').querySelector('select');
  return name && [...$('form').elements].find(e => e.name === name && !e.closest('[hidden]'));
}

// Shows an error at a field of the form, or before another element. Returns null.
function complain(at, ...message) {
  const error = element('p', {className: 'error'}, ...message);
  error.setAttribute('role', 'alert');
  if (!$('form').contains(at)) {
    at.before(error);
    return null;
  }
  clearErrors();
  error.id = at.id + '-error';
  at.closest('.field').append(error);
  at.setAttribute('aria-invalid', 'true');
  at.setAttribute('aria-errormessage', error.id);
  if (at.closest('details')) at.closest('details').open = true;
  at.focus();
  return null;
}

function clearErrors() {
  for (const e of document.querySelectorAll('.error')) e.remove();
  for (const e of document.querySelectorAll('[aria-invalid]')) {
    e.removeAttribute('aria-invalid');
    e.removeAttribute('aria-errormessage');
  }
}

function updateButtons() {
  const writing = panels.some(p => p.abort);
  if (!writing && document.activeElement === $('stop')) $('write').focus();
  $('stop').disabled = !writing;
  $('another').disabled = !panels.some(p => p.poem);
}

function write() {
  const request = readForm();
  if (!request) return;
  const two = !$('compare-field').hidden && $('compare').checked;
  setPanels(two ? 2 : 1);
  panels[0].write({...request, model: $('model').value || undefined});
  if (!two) return;
  const known = models.find(m => m.id === $('model2').value).tags;
  const tags = Object.fromEntries(Object.entries(request.tags).filter(([k, v]) => known[k]?.includes(v)));
  panels[1].write({...request, model: $('model2').value, tags});
}

// ---------------------------------------------------------------------------------------------
// A server that is lost

const retries = new Map();  // what to do again when it is back: a function for each panel, and for 'models'

function showLost(owner, again) {
  retries.set(owner, again);
  $('lost').hidden = false;
}

// The owner has its answer, or does not want it any more.
function found(owner) {
  retries.delete(owner);
  $('lost').hidden = !retries.size;
}

async function loadModels() {
  try {
    const response = await fetch('/v1/models').catch(lost);
    if (!response.ok) throw new Lost(response.statusText);
    models = (await response.json().catch(lost)).data;
  } catch (error) {
    if (!(error instanceof Lost)) throw error;
    return showLost('models', loadModels);
  }
  drawModels();
  found('models');
}

// ---------------------------------------------------------------------------------------------

function start() {
  $('form').onsubmit = event => {
    event.preventDefault();
    write();
  };
  $('prompt').onkeydown = event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit();
  };
  $('stop').onclick = () => panels.forEach(p => p.abort?.abort());
  $('another').onclick = () => {
    const seed = newSeed();
    for (const p of panels) p.another(seed);
  };
  $('retry').onclick = () => {
    for (const [owner, again] of [...retries]) {
      found(owner);
      again();
    }
    if ($('lost').hidden) $('write').focus({preventScroll: true});  // the button that had the focus is gone
  };
  $('language').onclick = () => setLanguage(language === 'ar' ? 'en' : 'ar');
  $('model').onchange = drawTags;
  $('compare').onchange = () => { $('model2').hidden = !$('compare').checked; };
  $('rhyme').onchange = () => {
    $('letters').hidden = $('rhyme').value !== 'letters';
    if (!$('letters').hidden) $('letters').focus();
  };
  document.addEventListener('pointerdown', event => {
    if (!$('choices').contains(event.target)) closeChoices();
  });
  setPanels(1);
  setLanguage(language);
  updateButtons();
  loadModels();
}

start();
