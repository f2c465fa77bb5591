// The browser's half of search.py: the same form for each word, and which page comes first.
const oneForm = (word) => {
  word = Array.from(word.toLowerCase(), (letter) => GREEK[letter] || letter).join("");
  word = word.replace(/^_+|_+$/g, "") || word;
  word = SAME[word] || word;
  for (const [pattern, ending] of SPELLING) word = word.replace(new RegExp(pattern), ending);
  return word;
};

const EnglishStemmer = Stemmer;
Stemmer = function () {
  const english = new EnglishStemmer();
  this.stemWord = (word) => english.stemWord(oneForm(word));
};

const formsOf = (text) => {
  const stemmer = new Stemmer();
  const words = splitQuery(text).filter((word) => !stopwords.includes(word.toLowerCase()));
  return new Set(words.map((word) => stemmer.stemWord(word.toLowerCase())));
};

// "#term-warm-up" is about "warm up", and "#statement-A1-16" about "statement A1.16".
const wordsOf = (anchor) =>
  anchor.slice(1).replace(/^term-/, "").replace(/(A\d)-(\d)/, "$1.$2").replaceAll("-", " ");

// All pages with a word have the same score, and would stand in the order of the alphabet.
Scorer.score = (result) => {
  const [, title, anchor, description, score] = result;
  if (description) return score; // an object of the library
  if (anchor && title.includes(" > ")) return score + 10; // a section
  if (anchor) {
    // An entry.  Without an excerpt the results have to say which one of the page's.
    if (!DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY) result[3] = wordsOf(anchor);
    return score;
  }
  const asked = formsOf(new URLSearchParams(location.search).get("q") || "");
  const own = formsOf(title);
  const found = [...asked].filter((word) => own.has(word)).length;
  return score + 10 * (found / Math.max(asked.size, 1));
};

// An excerpt would have to be fetched, which a browser does not do from the disk.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
