// version.cpp - the commit, from the Makefile.
#ifndef ARAPOET_COMMIT
#define ARAPOET_COMMIT "unknown"
#endif
const char* built_from_commit() { return ARAPOET_COMMIT; }
