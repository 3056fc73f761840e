// The sources this library was built from, as a hash that the package looks for in the file: a library that was left behind
// by an older checkout is not loaded.
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
extern "C" __attribute__((visibility("default"), used)) const char notebook_det_sources[] = "notebook_det sources " TEXT(NDET_SOURCES);
