"""Every cap and time-out of the product, with its name and its reason."""

from __future__ import annotations

# -- TPM ----------------------------------------------------------------------------------------
COMMAND_BYTES = 4096
"""Largest TPM command or response (swtpm and libtpms: TPM2 buffer of 4096 bytes)."""

EVENT_BYTES = 1024
"""Largest data of TPM2_PCR_Event (libtpms: TPM2B_EVENT, MAX 1024)."""

EXTEND_DIGESTS = 4
"""Most digests in one TPM2_PCR_Extend (libtpms: HASH_COUNT, beyond it TPM_RC_SIZE 0x1D5)."""

PCRS = 24
"""PCRs of a bank (TCG PC Client Platform TPM Profile, 4.5.1)."""

TPM_STRUCTURE_BYTES = 2048
"""Largest public area, attestation or signature that comes from another host; an RSA-2048 key has 316 bytes."""

OWN_TRIES = 4
"""How often the layer sends a command of its own that the TPM answers with TPM_RC_RETRY."""

# -- domain metadata ----------------------------------------------------------------------------
METADATA_BYTES = 65536
"""Largest metadata element; a sensible one has 600 bytes, and every hook call parses it."""

DOMAIN_XML_BYTES = 8 * 1024 * 1024
"""Largest domain XML on a hook's standard input; libvirt's own limit for XML-RPC strings is 4 MiB."""

PROPERTY_BANKS = 3
"""Most property banks: TPM 2.0 in libtpms has four banks, and one stays raw."""

BANK_PROPERTIES = 16
"""Most property URIs in a bank; each costs a lookup for each measurement."""

URI_CHARS = 512
"""Longest property URI or issuer id."""

# -- certificates and index ---------------------------------------------------------------------
CERTIFICATE_BYTES = 64 * 1024 * 1024
"""Largest DSSE envelope: 100,000 subjects need about 40 MB of JSON and base64."""

SUBJECTS = 200_000
"""Most subjects of one certificate."""

ANNOTATIONS = 8
"""Most annotations of one subject; ours are three."""

ANNOTATION_CHARS = 256
"""Longest name or value of an annotation; the longest Debian package name has 66 characters, its version 60."""

JSON_VALUES = 2_500_000
"""Most values in certificate JSON, by its braces, brackets and commas; a certificate of SUBJECTS subjects with three
digests and two annotations each has 2,000,000. 64 MB of empty objects would take 1.8 GB of memory."""

JSON_DEPTH = 16
"""Deepest nesting of certificate JSON; ours needs 5."""

EVENT_LOG_BYTES = 16 * 1024 * 1024
"""Largest event log read; OVMF writes 30 kB, a shim or grub boot 100 kB."""

EVENTS = 65536
"""Most records of one event log."""

IMA_LOG_BYTES = 32 * 1024 * 1024
"""Largest IMA measurement list read; a boot of a small system has 50 kB, a busy desktop after weeks 5 MB."""

IMA_ENTRIES = 200_000
"""Most entries of one IMA measurement list; a certificate cannot have more subjects."""

IMAGE_BYTES = 1024 * 1024 * 1024
"""Largest PE image read for its Authenticode hash; a unified kernel image has 60 MB."""

CERTIFICATE_PROPERTIES = 64
"""Most properties of one certificate; each is a line of its row in the index."""

SIGNATURES = 16
"""Most signatures looked at in one envelope; each is tried with each key of the issuer."""

TRUST_BYTES = 1024 * 1024
"""Largest trust file: 1,000 issuers with a few keys each."""

ISSUER_KEYS = 16
"""Most keys of one issuer; with SIGNATURES it bounds the work a hostile certificate can cause."""

KEY_BYTES = 16384
"""Largest PEM key file; an Ed25519 or P-256 key has 250 bytes."""

CLAIMS_KEPT = 256
"""Certificates of the index kept in memory; a boot touches ten, and each takes half a kilobyte."""

CANDIDATES = 4096
"""Most index rows looked at for one measurement; more than this many certificates for one digest is an attack."""

VALIDITY_BYTES = 1024
"""What is read of the file that says until when the index is good; it has two lines of less than 200 bytes."""

# -- store --------------------------------------------------------------------------------------
METADATA_BYTES_MOST = 64 * 1024 * 1024
"""Largest signed metadata of a store; the list of 100,000 certificates has 25 MB."""

REVOKED_BYTES = 256 * 1024 * 1024
"""Most that a publisher remembers of what was revoked: hundreds of kernels with all modules, each 0.2 to 0.7 MB."""

ROOT_BYTES = 512 * 1024
"""Largest root of a store; one with twenty keys has 8 kB."""

TIMESTAMP_BYTES = 16384
"""Largest timestamp of a store; one with a signature has 500 bytes. A host fetches it without knowing its length."""

STORE_BYTES = 16 * 1024**3
"""Most certificates a host keeps of a store, in bytes; ten million digests have 4 GB."""

SYNC_SECONDS = 3600
"""Longest a sync may take, with a first download of a gigabyte over a slow line."""

SILENCE_SECONDS = 30
"""Longest a server of a store may keep silent before it counts as gone."""

ROOT_ROTATIONS = 256
"""Most roots a host follows in one sync; one a day for most of a year."""

STORE_DAYS = {"root": 365, "targets": 120, "snapshot": 14, "timestamp": 3}
"""How long what each role of a store signs is good. A host that is cut off, or fed old data, certifies nothing after
the timestamp's three days; a weekend without a publisher does no harm. Offline keys leave their safe three times a year
(targets) and once (root)."""

OFFLINE_NOTICE = 30 * 86400
"""How long before root or targets end, in seconds, a publisher is told: offline keys are with people who travel."""

METADATA_KEPT = 4
"""Generations of metadata a store keeps for hosts that are in the middle of a sync."""

FLOORS = 10_000
"""Most floors of components that a host heeds: one for every source package that a release revokes, many times over."""

VERSION_CHARS = 256
"""Longest version of a component; Debian's have 40."""

HOST_BYTES = 65536
"""Largest host configuration; a full one has 500 bytes."""

# -- layer --------------------------------------------------------------------------------------
LAYER_BYTES = 65536
"""Largest layer.json; three banks with sixteen of the longest URIs each have 25,000 bytes."""

# -- property log -------------------------------------------------------------------------------
LOG_BYTES = 16 * 1024 * 1024
"""Property log of one start; a guest can extend in a loop and must not fill the host's disk."""

LOG_LINE_BYTES = 65536
"""Longest line of the property log; a record with four digests and sixteen certificates has 2,500 bytes."""

# -- hook ---------------------------------------------------------------------------------------
ACTIVATION_SECONDS = 30
"""Longest that swtpm_setup may take to activate a bank; it takes 0.6 s, and never ends on a damaged state."""

ACTIVATION_LOG_BYTES = 4096
"""What is read of the end of swtpm_setup's log, which its user can fill; a failed activation writes 600 bytes."""

# -- this host ----------------------------------------------------------------------------------
DOCTOR_SECONDS = 20
"""Longest a program that the doctor tries may take; each ends within half a second on a healthy host."""

# -- fleet --------------------------------------------------------------------------------------
FLEET_CERTIFICATE_BYTES = 16384
"""Largest certificate of the fleet or of a TPM's maker; ours have 500 bytes, makers' up to 2,000."""

REVOCATIONS_BYTES = 4 * 1024 * 1024
"""Largest revocation list; 50,000 revoked certificates have 2 MB."""

NEWS_BYTES = 4 * 1024 * 1024
"""Largest approval list or list of revoked hosts that a store carries; the limit of either."""

FLEET_RECORD_BYTES = 32 * 1024 * 1024
"""Largest record of who was admitted to a fleet; 50,000 admissions have 20 MB."""

FLEET_DAYS = {"ca": 3650, "host": 730, "revocations": 120}
"""How long the fleet's signatures are good. The list of what is revoked is signed anew three times a year by an
offline key, like a store's targets; hosts enrol again every other year."""

MAKERS_BYTES = 4 * 1024 * 1024
"""Largest file of TPM makers' certificates; all makers together have 500 kB."""

EK_CHAIN = 5
"""Longest chain from a TPM's certificate to its maker's root; they have one or two intermediates."""

ENROLMENT_BYTES = 65536
"""Largest request or answer of an enrolment; they have 5 kB, of which two are the maker's certificate."""

QUOTE_TRIES = 4
"""How often a host quotes its PCRs while something is being measured into them; after boot that is rare."""

CLOCK_SKEW = 3600
"""How far, in seconds, a host's clock may be behind the fleet's without its new certificate being of the future."""

HOST_NAME_CHARS = 253
"""Longest host name (RFC 1035, section 2.3.4)."""

# -- agent --------------------------------------------------------------------------------------
LIBVIRT_RETRY_SECONDS = 1
"""How long the agent waits before it tries libvirt again; a daemon is restarted in less than a second."""

LIBVIRT_PROBE_SECONDS = 5
"""How often the agent looks whether libvirt is still there."""

LIBVIRT_PROBES = 3
"""Unanswered looks after which it is not."""

AGENT_PEERS = 32
"""Most peers the agent talks with at a time; ten guests at once is a host being emptied, and each talk takes 0.3 s."""

AGENT_PEERS_EACH = 12
"""Most of them from one address, so that none keeps the others out."""

AGENT_TALK_SECONDS = 20
"""Longest a talk with a peer may take in all. The TPM serves one after the other: ten at once wait 3 s for it."""

AGENT_PEERS_WAITING = 64
"""Most connections that wait for the agent in the kernel."""

SETTLE_SECONDS = 15
"""How often the agent looks at transfers that nobody has decided yet."""

PRUNE_ROUNDS = 24 * 60 * 60 // SETTLE_SECONDS
"""After how many such looks it takes finished transfers too, to forget old ones: once a day."""

AGENT_SETTLERS = 8
"""For how many guests the agent asks peers at a time; each that does not answer takes a few seconds."""

STAMP_SECONDS = 1
"""How long the agent waits before it offers libvirt a stamp again that had to wait for a job."""

AGENT_END_SECONDS = 5
"""Longest the agent goes on with talks and transfers in hand when it is told to end."""

METRICS_BYTES = 4096
"""Most of a request for metrics that is read; a scraper's has 200 bytes."""

METRICS_SECONDS = 2
"""Longest one asking for metrics may take; the next one waits so long."""

QEMU_LOG_BYTES = 65536
"""What is read of the end of QEMU's log of a guest; why the guest ended stands in the last lines."""

# -- custody ------------------------------------------------------------------------------------
STATE_BYTES = 4 * 1024 * 1024
"""Largest TPM state read; one with few keys has 6 kB, libtpms's NV memory 128 kB."""

STATE_LOG_BYTES = 4096
"""What is read of the end of the log of a swtpm that does not open a state; it writes 500 bytes."""

KEY_RECORD_BYTES = 65536
"""Largest record of a guest's key; one with two recovery keys has 2,000 bytes."""

CONVERSION_SECONDS = 10
"""Longest swtpm may take for one step of a conversion; it takes 4 ms."""

# -- the host's TPM -----------------------------------------------------------------------------
TPM_LOCK_SECONDS = 30
"""Longest to wait for another process that uses the host's TPM; one use takes a second on slow hardware."""

EPOCH_STEPS = 4096
"""Most steps to raise the epoch counter at once: a fleet revokes some times a year, a step takes 10 ms of hardware, and
an NV cell wears out after some hundred thousand."""

# -- transfer -----------------------------------------------------------------------------------
MESSAGE_BYTES = 65536
"""Largest message between two hosts; evidence, the largest, has 4 kB."""

RECOVERY_KEYS = 16
"""Most recovery keys a guest's key is wrapped to; each wrap has 500 bytes and travels with it."""

ENDPOINT_CHARS = 260
"""Longest ``host:port``."""

REFUSAL_CHARS = 1000
"""Longest text of a peer's refusal that is shown; ours have 300."""

APPROVALS = 1024
"""Most states in an approval list: a fleet of 20 kinds of machines with 50 states of each; a host checks all signatures
whenever it reads the list, 0.1 ms each."""

APPROVAL_LIST_BYTES = 4 * 1024 * 1024
"""Largest approval list; a state of 24 PCRs with the longest names has 3 kB, and a third more in its envelope."""

LABEL_CHARS = 128
"""Longest label of a state; a kind of machine, its firmware's version and its kernel's take 60."""

JOURNAL_BYTES = 65536
"""Largest file of a transfer; with a key and two recovery keys it has 3 kB."""

JOURNAL_DAYS = 30
"""How long a finished transfer is remembered, for people who look what happened; a day more or less."""

JOURNAL_LOCK_SECONDS = 10
"""Longest to wait for another process at the same guest's transfers; it writes files and may use the TPM once."""

ARRIVAL_SECONDS = 60
"""Longest from asking for a key to starting the process that receives the guest; it takes a second. After that a
transfer that did not come so far is given up."""

FETCH_SECONDS = 30
"""Longest a hook asks other hosts for a key, all together; it takes 0.3 s, and 3 s when ten guests come at once.
AGENT_TALK_SECONDS of these are left to the talk with the host that has it."""

GREETING_SECONDS = 3
"""How long a hook waits for this host's agent to greet before it does the work itself; it takes a millisecond."""

LET_IN_SECONDS = 60
"""Longest the agent works for a hook: FETCH_SECONDS, and the time that others may hold the host's TPM."""

REACH_SECONDS = 1.5
"""Least to connect to each of several hosts: a first packet that is lost is sent again after 1 s (RFC 6298, 2.1)."""

REPORT_SECONDS = 5
"""Longest to ask a peer how far a transfer is; a guest's start may wait for it."""

SETTLE_ROUNDS = 4
"""Most reports about one transfer in a row; two hosts that agree need three."""
