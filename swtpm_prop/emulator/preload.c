/* The object preloaded into swtpm: puts the Python layer before libtpms, or keeps swtpm from coming up.
 *
 * The shim hands swtpm a first argument that swtpm refuses ("Socket"); only the constructor below, once the layer
 * stands, turns it into the real one. So a swtpm that lost this object on the way does not come up as a plain TPM.
 * Constructors are given argc and argv by the GNU C library alone; with another C library swtpm never comes up.
 *
 * Nothing of a guest's bytes is looked at here but the command code in the header.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ctype.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <malloc.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define INTERPOSED __attribute__((visibility("default")))
#define LAYER_VARIABLE "SWTPM_PROP_LAYER"
#define REINSTALL "install swtpm-prop where the swtpm user can read it"

enum {
	HEADER = 10,      /* tag (2 bytes), size (4), command code (4), big endian */
	MAX_CODES = 16,   /* the layer names about five */
	OWN_LOWEST = 64,  /* our descriptors stay above those that a caller may name in swtpm's arguments */
	REASON = 1024,
};

typedef TPM_RESULT process_function(unsigned char **, uint32_t *, uint32_t *, unsigned char *, uint32_t);
typedef TPM_RESULT main_init_function(void);
typedef TPM_RESULT choose_function(TPMLIB_TPMVersion);

static process_function *real_process;
static main_init_function *real_main_init;
static choose_function *real_choose;

static PyObject *layer;
static PyObject *breaks;
static PyObject *process;
static uint32_t codes[MAX_CODES];
static size_t code_count;
static bool failed;
static PyGILState_STATE fork_state;

/* Every command that can change a PCR: refused once the layer has failed. */
static const uint32_t changes_pcr[] = {
	0x12B /* PCR_Allocate */, 0x13C /* PCR_Event */, 0x13D /* PCR_Reset */,
	0x144 /* Startup */, 0x182 /* PCR_Extend */, 0x185 /* EventSequenceComplete */,
};
static const unsigned char rc_failure[HEADER] = { 0x80, 0x01, 0, 0, 0, HEADER, 0, 0, 0x01, 0x01 };

/* -- refusing to come up ------------------------------------------------------------------------ */

static _Noreturn void refuse_line(const char *line)
{
	dprintf(STDERR_FILENO, "swtpm-prop: %s\n", line);
	_exit(1);
}

static _Noreturn void refuse(const char *what, const char *id, const char *mend)
{
	char line[REASON];

	snprintf(line, sizeof(line), "%s [%s]: %s", what, id, mend);
	refuse_line(line);
}

static PyObject *take_exception(void)
{
#if PY_VERSION_HEX >= 0x030C0000
	return PyErr_GetRaisedException();
#else
	PyObject *type, *value, *trace;

	PyErr_Fetch(&type, &value, &trace);
	PyErr_NormalizeException(&type, &value, &trace);
	Py_XDECREF(type);
	Py_XDECREF(trace);
	return value;
#endif
}

/* Our own errors say everything in one line; anything else is named by its type. Clears the exception. */
static void reason(char line[REASON])
{
	PyObject *error = take_exception();
	PyObject *text = error ? PyObject_Str(error) : NULL;
	const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;

	if (error && utf8 && PyObject_HasAttrString(error, "mend"))
		snprintf(line, REASON, "%s", utf8);
	else
		snprintf(line, REASON, "the layer cannot run: %s: %s [layer.python]: " REINSTALL,
			 error ? Py_TYPE(error)->tp_name : "no exception", utf8 ? utf8 : "");
	for (char *c = line; *c; c++)
		if (iscntrl((unsigned char)*c))
			*c = ' ';
	Py_XDECREF(text);
	Py_XDECREF(error);
	PyErr_Clear();
}

static _Noreturn void refuse_exception(void)
{
	char line[REASON];

	reason(line);
	refuse_line(line);
}

/* -- between swtpm and libtpms ------------------------------------------------------------------ */

/* No PCR may go on saying "held" of what the layer did not see to its end, nor in a snapshot taken from now on. */
static void break_pcrs(void)
{
	unsigned char *response = NULL;
	uint32_t capacity = 0, size = 0;

	for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(breaks); i++) {
		PyObject *command = PyTuple_GET_ITEM(breaks, i);

		real_process(&response, &size, &capacity, (unsigned char *)PyBytes_AS_STRING(command),
			     (uint32_t)PyBytes_GET_SIZE(command));
	}
	free(response);
}

/* The layer failed: break what it keeps, say so in swtpm's log and never again let a PCR change. The interpreter
 * lock is held. */
static void give_up(void)
{
	int (*logprintf)(int, const char *, ...);
	void (*before)(int);
	char line[REASON];

	failed = true;
	reason(line);
	break_pcrs();
	*(void **)&logprintf = dlsym(RTLD_DEFAULT, "logprintf");
	if (!logprintf)
		return;
	/* without --log it writes to stderr, which under libvirt is a pipe that nobody reads */
	before = signal(SIGPIPE, SIG_IGN);
	logprintf(STDERR_FILENO, "swtpm-prop: %s\n", line);
	signal(SIGPIPE, before);
}

static bool among(uint32_t code, const uint32_t *table, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (table[i] == code)
			return true;
	return false;
}

static uint32_t command_code(const unsigned char *command, uint32_t size)
{
	if (size < HEADER)
		return 0;
	return (uint32_t)command[6] << 24 | (uint32_t)command[7] << 16 | (uint32_t)command[8] << 8 | command[9];
}

/* Hand over an answer in the caller's buffer, which is malloc'ed and may be NULL (libtpms: TPM_Realloc). */
static TPM_RESULT answer(unsigned char **response, uint32_t *size, uint32_t *capacity, const void *bytes,
			 size_t length)
{
	if (!*response || *capacity < length) {
		unsigned char *larger = realloc(*response, length);

		if (!larger)
			return TPM_SIZE;
		*response = larger;
		*capacity = (uint32_t)length;
	}
	memcpy(*response, bytes, length);
	*size = (uint32_t)length;
	return TPM_SUCCESS;
}

INTERPOSED TPM_RESULT TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *capacity,
				     unsigned char *command, uint32_t command_size)
{
	uint32_t code = command_code(command, command_size);
	TPM_RESULT result = TPM_FAIL;
	PyGILState_STATE state;
	PyObject *request, *bytes;

	if (failed && among(code, changes_pcr, Py_ARRAY_LENGTH(changes_pcr)))
		return answer(response, size, capacity, rc_failure, sizeof(rc_failure));
	if (failed || !among(code, codes, code_count))
		return real_process(response, size, capacity, command, command_size);

	state = PyGILState_Ensure();
	request = PyBytes_FromStringAndSize((const char *)command, command_size);
	bytes = request ? PyObject_CallOneArg(process, request) : NULL;
	if (bytes && PyBytes_Check(bytes))
		result = answer(response, size, capacity, PyBytes_AS_STRING(bytes), (size_t)PyBytes_GET_SIZE(bytes));
	if (result != TPM_SUCCESS) {
		give_up();
		result = answer(response, size, capacity, rc_failure, sizeof(rc_failure));
	}
	Py_XDECREF(bytes);
	Py_XDECREF(request);
	PyGILState_Release(state);
	return result;
}

/* The TPM was started: by a machine's reset, or to go on from a saved or migrated state. */
INTERPOSED TPM_RESULT TPMLIB_MainInit(void)
{
	TPM_RESULT result = real_main_init();
	PyGILState_STATE state;
	PyObject *done;

	if (result != TPM_SUCCESS || !layer || failed)
		return result;
	state = PyGILState_Ensure();
	done = PyObject_CallMethod(layer, "resumed", NULL);
	if (!done)
		give_up();
	Py_XDECREF(done);
	PyGILState_Release(state);
	return result;
}

/* A TPM 1.2 has no PCR banks, and nothing of it would come to the layer. */
INTERPOSED TPM_RESULT TPMLIB_ChooseTPMVersion(TPMLIB_TPMVersion version)
{
	if (layer && version != TPMLIB_TPM_VERSION_2)
		refuse("the guest has a TPM 1.2, which has no property bank", "layer.tpm-version",
		       "give its <backend type='emulator'> version='2.0'");
	return real_choose(version);
}

/* execute(command: bytes) -> bytes: one command of the layer's for the real TPM. */
static PyObject *execute(PyObject *self, PyObject *command)
{
	static unsigned char *response;
	static uint32_t capacity;
	uint32_t size = 0;
	char *bytes;
	Py_ssize_t length;
	TPM_RESULT result;

	(void)self;
	if (PyBytes_AsStringAndSize(command, &bytes, &length) < 0)
		return NULL;
	result = real_process(&response, &size, &capacity, (unsigned char *)bytes, (uint32_t)length);
	if (result != TPM_SUCCESS)
		return PyErr_Format(PyExc_RuntimeError, "TPMLIB_Process: %#x", (unsigned int)result);
	return PyBytes_FromStringAndSize((const char *)response, size);
}

/* -- coming up ---------------------------------------------------------------------------------- */

/* Hold every free low descriptor while the layer opens its files, so that swtpm finds them free as without us. */
static void hold_low_descriptors(bool held[OWN_LOWEST])
{
	int descriptor = open("/dev/null", O_RDONLY | O_CLOEXEC);

	while (descriptor >= 0 && descriptor < OWN_LOWEST) {
		held[descriptor] = true;
		descriptor = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
	}
	if (descriptor >= OWN_LOWEST)
		close(descriptor);
}

static void free_low_descriptors(const bool held[OWN_LOWEST])
{
	for (int descriptor = 0; descriptor < OWN_LOWEST; descriptor++)
		if (held[descriptor])
			close(descriptor);
}

static void check(PyStatus status)
{
	if (PyStatus_Exception(status))
		refuse(status.err_msg ? status.err_msg : "the Python interpreter does not start", "layer.python",
		       "check that " SWTPM_PROP_STDLIB " is complete and readable for the swtpm user");
}

static void add_path(PyConfig *config, const char *path)
{
	wchar_t *wide = Py_DecodeLocale(path, NULL);

	if (!wide)
		refuse("a module path cannot be decoded", "layer.python", REINSTALL);
	check(PyWideStringList_Append(&config->module_search_paths, wide));
	PyMem_RawFree(wide);
}

/* Nothing of the environment, of site-packages or of the user gets in; nothing is written; signals stay swtpm's. */
static void start_python(const char *packages)
{
	PyPreConfig before;
	PyConfig config;

	PyPreConfig_InitIsolatedConfig(&before);
	before.utf8_mode = 1;
	check(Py_PreInitialize(&before));
	PyConfig_InitIsolatedConfig(&config);
	config.site_import = 0;
	config.write_bytecode = 0;
	config.install_signal_handlers = 0;
	config.module_search_paths_set = 1;
	add_path(&config, SWTPM_PROP_STDLIB);
	add_path(&config, SWTPM_PROP_DYNLOAD);
	add_path(&config, packages);
	check(Py_InitializeFromConfig(&config));
	PyConfig_Clear(&config);
}

static void take_codes(void)
{
	PyObject *listed = PyObject_GetAttrString(layer, "codes");

	if (!listed || !PyTuple_Check(listed) || PyTuple_GET_SIZE(listed) > MAX_CODES)
		refuse_exception();
	for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(listed); i++)
		codes[code_count++] = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(listed, i));
	if (PyErr_Occurred())
		refuse_exception();
	Py_DECREF(listed);
}

static void take_breaks(void)
{
	breaks = PyObject_GetAttrString(layer, "breaks");
	if (!breaks || !PyTuple_Check(breaks))
		refuse_exception();
	for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(breaks); i++)
		if (!PyBytes_Check(PyTuple_GET_ITEM(breaks, i)))
			refuse_exception();
}

static void start_layer(const char *path)
{
	static PyMethodDef definition = { "execute", execute, METH_O, NULL };
	PyObject *callable = PyCFunction_New(&definition, NULL);
	PyObject *lean = PyImport_ImportModule("swtpm_prop.emulator.lean");
	PyObject *module = lean ? PyImport_ImportModule("swtpm_prop.emulator.layer") : NULL;

	if (!callable || !module)
		refuse_exception();
	layer = PyObject_CallMethod(module, "start", "sO", path, callable);
	process = layer ? PyObject_GetAttrString(layer, "process") : NULL;
	if (!process)
		refuse_exception();
	take_codes();
	take_breaks();
	Py_DECREF(module);
	Py_DECREF(lean);
	Py_DECREF(callable);
}

/* swtpm --daemon forks: the child goes on with the interpreter, as os.fork() would leave it. */
static void before_fork(void)
{
	fork_state = PyGILState_Ensure();
	PyOS_BeforeFork();
}

static void in_parent(void)
{
	PyOS_AfterFork_Parent();
	PyGILState_Release(fork_state);
}

static void in_child(void)
{
	PyOS_AfterFork_Child();
	PyGILState_Release(fork_state);
}

/* The directory that holds the package: this object lies in swtpm_prop/emulator/. */
static char *package_parent(void)
{
	char file[PATH_MAX];
	char *path, *slash = NULL;
	Dl_info info;

	if (!dladdr(rc_failure, &info) || !(path = strdup(info.dli_fname)))
		refuse("the preloaded object does not find itself", "layer.preload", REINSTALL);
	for (int up = 0; up < 3; up++) {
		slash = strrchr(path, '/');
		if (!slash)
			refuse("the preloaded object is not in its package", "layer.preload", REINSTALL);
		*slash = '\0';
	}
	snprintf(file, sizeof(file), "%s/swtpm_prop/emulator/layer.py", path);
	if (access(file, R_OK) != 0)
		refuse("the package swtpm_prop is not readable for the swtpm user", "layer.package-unreadable",
		       REINSTALL);
	if (access(SWTPM_PROP_STDLIB "/encodings/__init__.py", R_OK) != 0)
		refuse("Python's standard library " SWTPM_PROP_STDLIB " is missing or unreadable", "layer.python",
		       "install " SWTPM_PROP_LIBRARY "'s standard library, readable for the swtpm user");
	return path;
}

/* Leave the environment as the caller of the shim made it: we are the first in LD_PRELOAD. */
static void restore_environment(void)
{
	const char *preload = getenv("LD_PRELOAD");
	const char *rest = preload ? strpbrk(preload, ": ") : NULL;
	char *others = rest ? strdup(rest + 1) : NULL;

	unsetenv(LAYER_VARIABLE);
	if (others)
		setenv("LD_PRELOAD", others, 1);
	else
		unsetenv("LD_PRELOAD");
	free(others);
}

static void *next(const char *symbol)
{
	return dlsym(RTLD_NEXT, symbol);
}

__attribute__((constructor)) static void come_up(int argc, char **argv)
{
	bool held[OWN_LOWEST] = { false };
	const char *path = getenv(LAYER_VARIABLE);
	char *packages;

	*(void **)&real_process = next("TPMLIB_Process");
	*(void **)&real_main_init = next("TPMLIB_MainInit");
	*(void **)&real_choose = next("TPMLIB_ChooseTPMVersion");
	if (!path)
		return;
	if (!real_process || !real_main_init || !real_choose)
		refuse("this swtpm is not dynamically linked to libtpms", "layer.libtpms",
		       "use a swtpm that is, as Debian's");
	if (argc < 2 || !isupper((unsigned char)argv[1][0]))
		refuse("swtpm was not started by the shim of swtpm-prop", "layer.arguments",
		       "start it through the swtpm in swtpm-prop's own directory");
	packages = package_parent();
	hold_low_descriptors(held);
	start_python(packages);
	start_layer(path);
	free_low_descriptors(held);
	free(packages);
	if (pthread_atfork(before_fork, in_parent, in_child) != 0)
		refuse("no memory", "layer.memory", "free some");
	argv[1][0] = (char)tolower((unsigned char)argv[1][0]);
	restore_environment();
	/* what importing left behind goes back to the system: a seventh of our private memory */
	PyGC_Collect();
	malloc_trim(0);
	PyEval_SaveThread();
}
