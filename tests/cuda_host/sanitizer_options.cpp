// What UBSan does in the emulated library when it has said what it found: an abort, at which pytest names the test.

extern "C" const char* __ubsan_default_options();
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
