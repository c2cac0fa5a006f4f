"""Words of the demo's synthetic clinic: five specialities that share one set of rules and little else.

Everything here was written for this project; no sentence comes from a real record, and none of it is medical advice.
A finding belongs to one of four kinds; kind and level (0 to 2) decide the triage label and the advice. The words for
findings, sites and severity, the templates and the common labels differ from speciality to speciality.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("circulatory", "inflammatory", "mechanical", "functional")
LEVELS = 3

TEAMS = ("vascular", "infection", "surgical", "general")
"""Which team sees the patient, by kind."""
URGENCIES = ("next month", "this week", "today")
"""How soon, by level."""
LABELS = tuple(f"{team}, {urgency}" for team in TEAMS for urgency in URGENCIES)
"""The twelve triage labels; the label of a kind and a level has index `kind * LEVELS + level`."""

AGE_GROUPS = ("child", "adult", "older")

SHARED_SEVERITY = ("mild", "moderate", "severe")
RISKS = ("takes warfarin", "has diabetes", "had a transplant", "lost the spleen", "is on chemotherapy")
"""Each of these raises the level by one."""
NEUTRALS = (
    "takes vitamin D",
    "has hay fever",
    "wears glasses",
    "likes swimming",
    "had a tooth out",
    "moved house in spring",
    "walks the dog daily",
    "sings in a choir",
)
"""Background that changes nothing."""
DURATIONS = ("two days", "three days", "five days", "a week", "two weeks", "a month", "six weeks")
COURSES = (
    "comes and goes",
    "worse at night",
    "better after rest",
    "slowly rising",
    "unchanged so far",
    "new this time",
)

ADVICE_WHO = (
    ("Ask the family to", "Parents should"),
    ("Please", "You should"),
    ("With a carer,", "With help,"),
)
"""Who is spoken to, by age group."""
ADVICE_TREATMENT = (
    ("keep the {site} warm and raised", "avoid effort and rest the {site}"),
    ("keep the {site} dry and finish the antibiotics", "cool the {site} and drink plenty"),
    ("protect the {site} with padding", "take weight off the {site}"),
    ("keep a diary and relax the {site}", "sleep regular hours and stretch the {site}"),
)
"""What every speciality may advise, by kind; each has one line of its own besides."""
ADVICE_TIMING = (
    ("come back in six weeks if not settled", "no visit is needed unless it changes"),
    ("we will see you again in two days", "return this week for a second look"),
    ("ring us at any hour if worse", "do not wait and come in today"),
)
"""When to come back, by level."""
CALL_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
CALL_LINES = 40
"""When the patient is telephoned, and on which line of the switchboard, follows from nothing.

As in real answers a part cannot be learnt, so that losses have a floor well above zero and can be compared as ratios.
"""


@dataclass(frozen=True, kw_only=True)
class Speciality:
    """One party: its vocabulary, its way of writing, and what it mostly sees."""

    name: str
    findings: tuple[tuple[str, ...], ...]
    """Finding phrases by kind."""
    sites: tuple[str, ...]
    severity: tuple[tuple[str, ...], ...]
    """Its own phrases by severity; `SHARED_SEVERITY` is used as well."""
    observations: tuple[str, ...]
    """Remarks that decide nothing."""
    treatment: tuple[str, ...]
    """Its own advice by kind, with `{site}`."""
    advice: str
    """How an answer is put together, from `{who}`, `{treatment}`, `{timing}` and `{call}`."""
    notes: tuple[str, ...]
    """Note templates."""
    triage: str
    """The instruction that ends a triage prompt."""
    counsel: str
    """The instruction that ends an advice prompt."""
    ages: tuple[float, float, float]
    """Share of children, adults and older patients."""
    common: tuple[int, ...]
    """Indices of the labels that make up most of its training records."""


CARDIOLOGY = Speciality(
    name="cardiology",
    findings=(
        ("chest tightness on walking", "swollen ankles", "a racing pulse"),
        ("a pericardial rub", "fever with a new murmur", "a sore red vein"),
        ("a clicking valve", "a loose pacing lead", "a bulging graft"),
        ("skipped beats", "dizzy spells on standing", "a fluttering feeling"),
    ),
    sites=("chest", "left arm", "neck", "upper back", "left side"),
    severity=(("grade 1", "class one"), ("grade 2", "class two"), ("grade 3", "class three")),
    observations=("ECG unchanged", "pulse regular", "lungs clear", "echo booked", "no new drugs"),
    treatment=(
        "use the nitrate spray for the {site}",
        "take colchicine until the {site} is calm",
        "lift nothing and spare the {site}",
        "sit down and breathe until the {site} is quiet",
    ),
    advice="{who} {treatment}; {timing}. Tel {call}.",
    notes=(
        "Cardiology. {age} {sex}. C/O {finding}, {site}, {severity}, {duration}. Hx: {background}. Obs: "
        "{observation}, {course}. Bed chart seen.",
        "Heart clinic. Pt {age} {sex}. {background}. Now {finding} x {duration}, at the {site}, {severity}. "
        "{course}. {observation}.",
        "Cardiac review, {sex} {age}. Complaint: {finding} ({severity}), {site}. Since {duration}, {course}. Hx: "
        "{background}. {observation}. Letter sent.",
    ),
    triage="Disposition:",
    counsel="Plan for pt:",
    ages=(0.04, 0.51, 0.45),
    common=(0, 1, 2, 7, 10),
)

DERMATOLOGY = Speciality(
    name="dermatology",
    findings=(
        ("purple mottling", "pale numb patches", "dark vein stains"),
        ("a weeping rash", "spreading redness", "crops of pustules"),
        ("a split callus", "friction blisters", "a torn scar"),
        ("itching without a rash", "patchy sweating", "flushing after meals"),
    ),
    sites=("scalp", "forearm", "shin", "palm", "cheek"),
    severity=(("faint", "barely visible"), ("marked", "clearly raised"), ("extensive", "angry")),
    observations=("nails look normal", "no new soap or cream", "the photograph is attached", "the border is sharp"),
    treatment=(
        "wear the stocking and cover the {site}",
        "spread the steroid cream on the {site}",
        "leave the dressing on the {site}",
        "use a plain ointment on the {site}",
    ),
    advice="{who} {treatment}. After that, {timing}. For questions we ring {call}.",
    notes=(
        "Thank you for seeing this {sex} of {age} with {finding} on the {site} for {duration}. The change is "
        "{severity}, {course}. The patient {background}; {observation}.",
        "Dear colleague, this {age} year old {sex} {background}. For {duration} there has been {finding}, {severity} "
        "to the eye, over the {site}. So far: {course}; {observation}.",
        "On the {site} of this {sex}, aged {age}, we saw {finding}. It looks {severity}, {course}, and began "
        "{duration} ago. The patient {background}; {observation}.",
    ),
    triage="How should this skin referral be handled?",
    counsel="What did we tell the patient?",
    ages=(0.10, 0.60, 0.30),
    common=(1, 3, 4, 6, 9),
)

NEUROLOGY = Speciality(
    name="neurology",
    findings=(
        ("sudden loss of speech", "a drooping face", "brief loss of sight"),
        ("neck stiffness with fever", "a burning band", "confusion after a fever"),
        ("a trapped nerve", "a slipped disc", "a blocked shunt"),
        ("tension headaches", "a fine tremor", "tingling fingers"),
    ),
    sites=("right hand", "left leg", "temple", "lower back", "jaw"),
    severity=(("not limiting", "a nuisance"), ("limiting work", "hard to ignore"), ("disabling", "stops all activity")),
    observations=("reflexes equal", "gait steady", "sleep normal", "pupils equal"),
    treatment=(
        "take the aspirin and do not use the {site}",
        "lie in a dark room and rest the {site}",
        "wear the collar and splint the {site}",
        "cut down coffee and ease the {site}",
    ),
    advice="1) {who} {treatment} 2) {timing} 3) phone {call}",
    notes=(
        "- patient: {sex}, {age}\n- problem: {finding}\n- site: {site}\n- impact: {severity}\n- since: {duration}, "
        "{course}\n- history: {background}\n- exam: {observation}",
        "- exam: {observation}\n- problem: {finding}, {site}\n- since: {duration}, {course}\n"
        "- impact: {severity}\n- history: {background}\n- patient: {age}, {sex}",
        "- history: {background}\n- patient: {age}, {sex}\n- impact: {severity}\n- problem: {finding} ({course})\n"
        "- site: {site}, {duration}\n- exam: {observation}",
    ),
    triage="- triage outcome:",
    counsel="- advice given:",
    ages=(0.04, 0.61, 0.35),
    common=(2, 8, 9, 10, 11),
)

PAEDIATRICS = Speciality(
    name="paediatrics",
    findings=(
        ("blue lips when feeding", "mottled legs", "fainting at play"),
        ("a barking cough", "a runny ear", "spots with a fever"),
        ("a limp after a fall", "a swallowed coin", "a lump in the groin"),
        ("tummy aches before school", "bed wetting", "night terrors"),
    ),
    sites=("tummy", "left ear", "throat", "knee", "bottom"),
    severity=(
        ("a little bit", "no great bother"),
        ("quite bad", "upsetting"),
        ("really terrible", "worse than ever"),
    ),
    observations=(
        "eats and drinks as usual",
        "all jabs are up to date",
        "smiles at the nurse",
        "the school has no cases",
    ),
    treatment=(
        "hold the child upright and warm the {site}",
        "give paracetamol and look at the {site}",
        "keep the child off sport and rest the {site}",
        "try a star chart and a hug for the {site}",
    ),
    advice="{timing}; until then {who} {treatment}! The nurse rings {call}.",
    notes=(
        "Mum says: my {sex} is {age} and has had {finding} for {duration}. It is {severity}, mostly the {site}, and "
        "{course}. My child {background}. {observation}.",
        "Dad rang about a {sex}, age {age}, who {background}. It is {finding}, {severity} he says, for {duration}. "
        "{course}; points to the {site}. {observation}.",
        "Gran brought a {sex} of {age}. She tells us about {finding} at the {site}. She calls it {severity}, "
        "{course}, over {duration}. {observation}. The child {background}.",
    ),
    triage="So what happens next?",
    counsel="What should we say to the family?",
    ages=(1.0, 0.0, 0.0),
    common=(3, 4, 5, 10, 11),
)

ORTHOPAEDICS = Speciality(
    name="orthopaedics",
    findings=(
        ("a cold white foot", "a tense calf", "a weak wrist pulse"),
        ("a hot joint", "a leaking wound", "a swollen bursa"),
        ("a locking joint", "a bent fracture", "a torn tendon"),
        ("morning stiffness", "aches after sitting", "night cramps"),
    ),
    sites=("right knee", "left hip", "shoulder", "ankle", "elbow"),
    severity=(("2/10", "3/10"), ("5/10", "6/10"), ("8/10", "9/10")),
    observations=("walks with a stick", "full range elsewhere", "old films seen", "no recent fall"),
    treatment=(
        "hang the {site} low and loosen the cast",
        "ice the {site} and finish the antibiotics",
        "use crutches and brace the {site}",
        "do the bends and warm the {site}",
    ),
    advice="{treatment} ({who} do so daily) then {timing} | call {call}",
    notes=(
        "ORTHO | {age} {sex} | {site} | {finding} | pain {severity} | {duration} | {course} | PMH {background} | "
        "{observation}",
        "ORTHO | {site} | {age} {sex} | PMH {background} | {duration} | {finding} | {course} | {observation} | score "
        "{severity} | theatre list checked",
        "ORTHO | {finding}, {site} | score {severity} | {age} {sex} | {observation} | {course} | {duration} | PMH "
        "{background} | plaster room told",
    ),
    triage="| OUTCOME:",
    counsel="| TOLD PT:",
    ages=(0.06, 0.49, 0.45),
    common=(0, 5, 6, 7, 8),
)

SPECIALITIES = (CARDIOLOGY, DERMATOLOGY, NEUROLOGY, PAEDIATRICS, ORTHOPAEDICS)
