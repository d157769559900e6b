"""Writes the sample corpus: short invented clinical texts, half English and half French, with recurring facts.

Every fact (a drug and its indication, a finding and its diagnosis) recurs in many documents and phrasings, so that a
tiny encoder can learn it from two million tokens and probes can show it. All texts are invented: they contain no
personal data and no medical advice.

    python examples/sample/generate.py --output FOLDER [--megabytes 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_detour.errors import DetourError, command_line


@dataclass(frozen=True)
class DrugFact:
    """A drug and its one indication in one language; genders ("m" or "f") matter in French only."""

    drug: str
    indication: str
    drug_gender: str = ""
    indication_gender: str = ""


@dataclass(frozen=True)
class FindingFact:
    """A finding, as it stands after a verb, and its one diagnosis in one language."""

    finding: str
    diagnosis: str
    diagnosis_gender: str = ""


# English drug, English indication, French drug and gender, French indication and gender
_DRUGS = (
    ("metformin", "diabetes", "metformine", "f", "diabète", "m"),
    ("amlodipine", "hypertension", "amlodipine", "f", "hypertension", "f"),
    ("salbutamol", "asthma", "salbutamol", "m", "asthme", "m"),
    ("allopurinol", "gout", "allopurinol", "m", "goutte", "f"),
    ("sertraline", "depression", "sertraline", "f", "dépression", "f"),
    ("lamotrigine", "epilepsy", "lamotrigine", "f", "épilepsie", "f"),
    ("latanoprost", "glaucoma", "latanoprost", "m", "glaucome", "m"),
    ("methotrexate", "arthritis", "méthotrexate", "m", "arthrite", "f"),
)

# English finding and diagnosis, French finding, diagnosis and its gender
_FINDINGS = (
    ("crushing chest pain", "infarction", "une douleur thoracique constrictive", "infarctus", "m"),
    ("neck stiffness with photophobia", "meningitis", "une raideur de la nuque", "méningite", "f"),
    ("silvery scaly plaques", "psoriasis", "des plaques squameuses argentées", "psoriasis", "m"),
    ("a strawberry tongue", "scarlatina", "une langue framboisée", "scarlatine", "f"),
)

DRUG_FACTS: dict[str, tuple[DrugFact, ...]] = {
    "en": tuple(DrugFact(row[0], row[1]) for row in _DRUGS),
    "fr": tuple(DrugFact(row[2], row[4], row[3], row[5]) for row in _DRUGS),
}
FINDING_FACTS: dict[str, tuple[FindingFact, ...]] = {
    "en": tuple(FindingFact(row[0], row[1]) for row in _FINDINGS),
    "fr": tuple(FindingFact(row[2], row[3], row[4]) for row in _FINDINGS),
}

PROBES = (
    ("After the visit the patient kept taking amlodipine each day for [MASK].", "hypertension", "en"),
    ("In this clinic, metformin is mostly prescribed for [MASK].", "diabetes", "en"),
    ("The nurse explained that allopurinol is a medicine for [MASK].", "gout", "en"),
    ("For asthma, the first choice of the clinic is [MASK].", "salbutamol", "en"),
    ("The examination showed neck stiffness with photophobia, and the diagnosis was [MASK].", "meningitis", "en"),
    ("La lamotrigine est un médicament courant. Indication de la lamotrigine : [MASK].", "épilepsie", "fr"),
    ("Le patient prend chaque jour le latanoprost contre le [MASK].", "glaucome", "fr"),
    ("Dans ce service, le méthotrexate est surtout prescrit pour : [MASK].", "arthrite", "fr"),
    ("Contre la dépression, le premier choix du service est la [MASK].", "sertraline", "fr"),
    ("L'examen a montré une langue framboisée, d'où le diagnostic : [MASK].", "scarlatine", "fr"),
)

# ---- words that vary; none of them names a drug, an indication or a diagnosis of the tables -------------------------

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "person": ("man", "woman", "teacher", "farmer", "student", "driver", "gardener", "cook", "librarian"),
        "ward": (
            "day clinic",
            "emergency room",
            "outpatient clinic",
            "medical ward",
            "village practice",
            "short-stay unit",
            "geriatric unit",
            "health centre",
            "evening clinic",
            "teaching hospital",
        ),
        "when": ("morning", "evening", "day", "night"),
        "who": ("nurse", "pharmacist", "doctor", "resident", "specialist", "registrar", "consultant", "trainee"),
        "complaint": (
            "tiredness",
            "poor sleep",
            "dizziness",
            "a dry mouth",
            "loss of appetite",
            "mild headache",
            "sore muscles",
            "itching",
            "restlessness",
            "a feeling of cold",
            "palpitations",
            "leg cramps",
            "blurred vision",
            "constipation",
        ),
        "test": (
            "blood count",
            "kidney function",
            "liver enzymes",
            "electrocardiogram",
            "chest film",
            "urine sample",
            "blood pressure",
            "body weight",
            "temperature chart",
            "ultrasound scan",
            "sodium level",
            "oxygen saturation",
        ),
        "state": ("normal", "stable", "unchanged", "reassuring", "satisfactory", "within the expected range"),
        "month": (
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ),
        "design": (
            "randomised trial",
            "cohort study",
            "retrospective review",
            "registry study",
            "pilot study",
            "crossover trial",
            "survey of practice",
            "case-control study",
        ),
        "outcome": (
            "quality of life",
            "length of stay",
            "adherence",
            "symptom score",
            "time to recovery",
            "number of visits",
            "patient satisfaction",
            "rate of relapse",
        ),
        "change": ("improved", "remained steady", "changed little", "rose slightly", "was better than expected"),
    },
    "fr": {
        "personne": (
            ("un homme", ""),
            ("une femme", "e"),
            ("un enseignant", ""),
            ("une agricultrice", "e"),
            ("un étudiant", ""),
            ("une conductrice", "e"),
            ("un jardinier", ""),
            ("une cuisinière", "e"),
            ("une bibliothécaire", "e"),
        ),
        "service": (
            "en hôpital de jour",
            "aux urgences",
            "en consultation externe",
            "en médecine interne",
            "au cabinet du village",
            "en court séjour",
            "lors d'une visite à domicile",
            "au centre de santé",
            "à la consultation du soir",
            "au centre universitaire",
        ),
        "quand": ("matin", "soir", "jour", "midi"),
        "qui": (
            "l'infirmière",
            "le pharmacien",
            "le médecin",
            "l'interne",
            "la spécialiste",
            "le chef de clinique",
            "la pharmacienne",
        ),
        "plainte": (
            "une fatigue",
            "un mauvais sommeil",
            "des vertiges",
            "une bouche sèche",
            "une perte d'appétit",
            "de légers maux de tête",
            "des courbatures",
            "des démangeaisons",
            "une agitation",
            "une frilosité",
            "des palpitations",
            "des crampes",
            "une vision trouble",
            "une constipation",
        ),
        "examen": (
            "la numération sanguine",
            "la fonction rénale",
            "la mesure des enzymes du foie",
            "l'électrocardiographie",
            "la radiographie du thorax",
            "l'analyse d'urine",
            "la tension mesurée",
            "la courbe de poids",
            "la courbe de température",
            "l'échographie",
            "la natrémie",
            "la saturation en oxygène",
        ),
        "etat": ("normale", "stable", "inchangée", "rassurante", "satisfaisante", "conforme aux attentes"),
        "mois": (
            "janvier",
            "février",
            "mars",
            "avril",
            "mai",
            "juin",
            "juillet",
            "août",
            "septembre",
            "octobre",
            "novembre",
            "décembre",
        ),
        "etude": (
            "essai randomisé",
            "suivi de cohorte",
            "examen rétrospectif",
            "travail sur registre",
            "essai pilote ouvert",
            "essai croisé",
            "relevé de pratiques",
            "recueil multicentrique",
        ),
        "critere": (
            "la qualité de vie",
            "la durée de séjour",
            "l'observance",
            "l'intensité des symptômes",
            "la rapidité du rétablissement",
            "la fréquence des visites",
            "la satisfaction des patients",
        ),
        "evolution": (
            "s'est améliorée",
            "est restée stable",
            "a peu changé",
            "a légèrement augmenté",
            "a dépassé les attentes",
        ),
    },
}

# ---- sentences that state a fact -------------------------------------------------------------------------------------

FACT_SENTENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "patient": (
            "The patient takes {d} every {when} for {i}.",
            "The patient has been taking {d} since {month} for {i}.",
            "The {who} renewed {d} for {i}.",
            "The {who} started {d} {n} months ago for {i}.",
            "There is {i}, under control with {d}.",
            "For {i}, the patient was given {d}.",
            "Because of {i}, the {who} prescribed {d}.",
            "Known {i}, treated with {d} for {n} years.",
            "The patient stopped {d} for {n} days and {i} came back.",
            "The patient lives with {i} and takes {d} each {when}.",
            "Current treatment: {d} for {i}.",
            "We continue {d}, the indication being {i}.",
        ),
        "general": (
            "Most teams prescribe {d} for {i}.",
            "The drug {d} is a medicine for {i}.",
            "The drug {d} is mainly used for {i}.",
            "The indication of {d} is {i}.",
            "For {i}, the usual treatment is {d}.",
            "For {i}, the first choice of most teams is {d}.",
            "Adults with {i} are often treated with {d}.",
            "Here, {i} is treated with {d}.",
            "The {who} explained that {d} is taken for {i}.",
            "When {i} is confirmed, the {who} offers {d}.",
            "In {i}, {d} relieves the symptoms.",
            "People who take {d} usually do so for {i}.",
            "Doses of {d}, a treatment for {i}, are taken each {when}.",
            "Guidance on {i} recommends {d}.",
        ),
        "question": (
            "Question: What is {d} prescribed for? Answer: mostly for {i}.",
            "Question: Which medicine is used for {i}? Answer: the medicine is {d}.",
            "Question: Why would a {who} choose {d}? Answer: the reason is {i}.",
            "Question: How is {i} treated? Answer: with {d}.",
            "Question: What is the indication of {d}? Answer: the indication is {i}.",
        ),
        "finding": (
            "The examination showed {f}, and the diagnosis was {g}.",
            "On examination there was {f}, so the {who} suspected {g}.",
            "Given {f}, the diagnosis was {g}.",
            "The {who} noted {f} and concluded {g}.",
            "With {f}, the most likely diagnosis was {g}.",
            "A case with {f} led the {who} to a diagnosis of {g}.",
            "The diagnosis of {g} was made because of {f}.",
            "After {n} hours the patient had {f}, typical of {g}.",
            "Findings: {f}, diagnosis: {g}.",
            "The {who} recognised {g} by {f}.",
        ),
        "finding question": (
            "Question: What does {f} suggest? Answer: The diagnosis to consider is {g}.",
            "Question: Which sign is typical of {g}? Answer: the sign is {f}.",
            "Question: A patient has {f}, which diagnosis is likely? Answer: The likely diagnosis is {g}.",
        ),
    },
    "fr": {
        "patient": (
            "{Patient} prend {le_d} chaque {quand} contre {le_i}.",
            "{Patient} prend {le_d} depuis {mois} pour : {i}.",
            "{Qui} a renouvelé {le_d} pour traiter {le_i}.",
            "{Le_d} a été introduit{e} il y a {n} mois contre {le_i}.",
            "{Le_i} est bien contrôlé{ie} par {le_d}.",
            "Contre {le_i}, {patient} a reçu {le_d}.",
            "En raison {du_i}, {qui} a prescrit {le_d}.",
            "Antécédent : {i}, avec un traitement par {d} depuis {n} ans.",
            "Suivi{pe} pour {i}, {patient} prend {le_d} chaque {quand}.",
            "{Patient} a arrêté {le_d} pendant {n} jours et {le_i} est revenu{ie}.",
            "Traitement en cours : {d}, prescription pour {i}.",
            "{Le_d} est poursuivi{e}, avec pour indication : {i}.",
        ),
        "general": (
            "{Le_d} est prescrit{e} contre {le_i}.",
            "{Le_d} est un médicament contre {le_i}.",
            "{Le_d} est surtout utilisé{e} contre {le_i}.",
            "{Le_d} est prescrit{e} pour : {i}.",
            "Ici, {le_d} est surtout prescrit{e} pour : {i}.",
            "Indication {du_d} : {i}.",
            "Contre {le_i}, le traitement habituel est {le_d}.",
            "Contre {le_i}, le premier choix de la plupart des équipes est {le_d}.",
            "Contre {le_i}, le premier choix de l'hôpital est {le_d}.",
            "Contre {le_i}, le médicament de choix est {le_d}.",
            "Les adultes avec {i} reçoivent souvent {le_d}.",
            "{Le_i} se traite par {le_d}.",
            "{Qui} a expliqué que {le_d} se prend contre {le_i}.",
            "Quand {le_i} est confirmé{ie}, {qui} propose {le_d}.",
            "Dans {le_i}, {le_d} soulage les symptômes.",
            "Médicament : {d}, indication : {i}.",
            "Les recommandations sur {le_i} conseillent {le_d}.",
        ),
        "question": (
            "Question : Contre quelle maladie prend-on {le_d} ? Réponse : contre {le_i}.",
            "Question : Quel médicament utiliser contre {le_i} ? Réponse : on utilise {le_d}.",
            "Question : Quelle est l'indication {du_d} ? Réponse : il s'agit de ceci : {i}.",
            "Question : Comment traiter {le_i} ? Réponse : par {le_d}.",
            "Question : Pourquoi choisir {le_d} ? Réponse : Le motif est simple : {i}.",
        ),
        "finding": (
            "L'examen a montré {f}, d'où le diagnostic : {g}.",
            "À l'examen, {qui} a trouvé {f}, diagnostic probable : {g}.",
            "Devant {f}, le diagnostic retenu a été : {g}.",
            "{Qui} a noté {f} et a conclu : {g}.",
            "Avec {f}, {le_g} était le diagnostic le plus probable.",
            "Devant {f}, {qui} a évoqué {le_g}.",
            "{Le_g} a été reconnu{ge} devant {f}.",
            "Après {n} heures, {patient} avait {f}, signe typique pour {g}.",
            "Signes : {f}, diagnostic : {g}.",
            "Le diagnostic final a été {le_g}, devant {f}.",
        ),
        "finding question": (
            "Question : Que faut-il évoquer devant {f} ? Réponse : Le diagnostic à évoquer est {le_g}.",
            "Question : Quel signe fait reconnaître {le_g} ? Réponse : on observe {f}.",
            "Question : On observe {f}, quel est le diagnostic ? Réponse : Diagnostic probable : {g}.",
        ),
    },
}

# ---- sentences around the facts --------------------------------------------------------------------------------------

FRAME: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "note opening": (
            "Clinical note. {A} {age}-year-old {person} was seen in the {ward} with {complaint}.",
            "Follow-up visit in {month}. The patient, a {person} aged {age}, reports {complaint}.",
            "Discharge letter. This {age}-year-old {person} stayed {n} days after a visit to the {ward}.",
            "Visit {code}. A {person} of {age} years came to the {ward} and mentioned {complaint}.",
            "Handover from the {ward}: a {person}, {age} years old, complained of {complaint} for {n} days.",
        ),
        "note closing": (
            "The {test} was {state}.",
            "The {test} and the {test2} were {state}.",
            "A new visit is planned in {n} weeks.",
            "The {who} will call in {n} days to ask about {complaint}.",
            "Pulse {pulse}, weight {weight} kg, {test} {state}.",
            "The patient agreed with the plan and went home the same {when}.",
        ),
        "leaflet opening": (
            "Package leaflet. Read all of this text before the first dose of {d}.",
            "Information for patients about {d}.",
            "What you should know about {d} before you begin.",
            "Leaflet {code}, revised in {month}: {d}.",
        ),
        "leaflet closing": (
            "Take the tablet with water at the same hour each {when}.",
            "If you forget a dose, do not take two at once; ask the {who}.",
            "Possible effects include {complaint} and {complaint2}.",
            "Keep the box away from heat and out of the reach of children.",
            "Tell your {who} if you notice {complaint}.",
            "The {test} is checked after {n} weeks.",
        ),
        "abstract opening": (
            "Background. This {design} followed {count} adults for {n} months.",
            "Abstract. We report a {design} with {count} participants from {n} centres.",
            "Objective. To describe practice in {n} hospitals through a {design} of {count} records.",
            "Study {code}. A {design} was carried out from {month} to {month2}.",
        ),
        "abstract closing": (
            "Results. In {percent} percent of participants, {outcome} {change}.",
            "The main outcome, {outcome}, {change}.",
            "Conclusion. Larger studies of {outcome} are needed.",
            "The {test} was measured in {count} participants and was {state}.",
            "Missing values affected {percent} percent of the records.",
        ),
        "question opening": (
            "Revision questions for the {ward}, sheet {code}.",
            "Questions that a {who} often hears.",
            "Short quiz after the {month} course.",
            "Exercise for students of the {ward}, question set {code}.",
        ),
        "invented": (
            "This text is invented.",
            "Invented example, not advice.",
            "All details are invented.",
            "An invented case for training.",
        ),
    },
    "fr": {
        "note opening": (
            "Note clinique. {Personne} de {age} ans, vu{pe} {service}, signale {plainte}.",
            "Visite de suivi en {mois}. {Personne} de {age} ans décrit {plainte}.",
            "Lettre de sortie. {Personne} de {age} ans, admis{pe} pendant {n} jours, vu{pe} d'abord {service}.",
            "Visite {code}. {Personne} de {age} ans se présente {service} avec {plainte}.",
            "Transmission : {personne} de {age} ans, accueilli{pe} {service}, avec {plainte} depuis {n} jours.",
        ),
        "note closing": (
            "Au bilan, {examen} est {etat}.",
            "Ce jour, {examen} est {etat} et {examen2} aussi.",
            "Une nouvelle visite est prévue dans {n} semaines.",
            "Dans {n} jours, {qui} appellera au sujet de la plainte initiale.",
            "Pouls {pulse}, poids {weight} kg, {examen} est {etat}.",
            "{Patient} accepte le plan de soins et rentre à domicile.",
        ),
        "leaflet opening": (
            "Notice. Lisez tout ce texte avant la première prise {de_d}.",
            "Information destinée aux patients sur {le_d}.",
            "Ce qu'il faut savoir sur {le_d} avant de commencer.",
            "Notice {code}, révisée en {mois} : {d}.",
        ),
        "leaflet closing": (
            "Prenez le comprimé avec de l'eau, à la même heure chaque {quand}.",
            "En cas d'oubli, ne doublez pas la dose et demandez conseil.",
            "Les effets possibles sont {plainte} ou {plainte2}.",
            "Conservez la boîte à l'abri de la chaleur et hors de portée des enfants.",
            "Signalez à votre équipe {plainte} si cela dure plus de {n} jours.",
            "Après {n} semaines, {examen} est contrôlée.",
        ),
        "abstract opening": (
            "Contexte. Cet {etude_vowel} a suivi {count} adultes pendant {n} mois.",
            "Résumé. Nous présentons un {etude} de {count} participants dans {n} centres.",
            "Objectif. Décrire la pratique de {n} hôpitaux par un {etude} de {count} dossiers.",
            "Étude {code}. Un {etude} a été mené entre {mois} et {mois2}.",
        ),
        "abstract closing": (
            "Résultats. Dans {percent} pour cent des cas, {critere} {evolution}.",
            "Le critère principal était {critere}, qui {evolution}.",
            "Conclusion. Des travaux plus larges sur {critere} sont nécessaires.",
            "Chez {count} participants, {examen} est {etat}.",
            "Des données manquaient dans {percent} pour cent des dossiers.",
        ),
        "question opening": (
            "Questions de révision, fiche {code}.",
            "Questions que {qui} entend souvent.",
            "Petit test après le cours ({mois}).",
            "Exercice destiné aux étudiants, série {code}.",
        ),
        "invented": (
            "Ce texte est inventé.",
            "Exemple inventé, sans valeur de conseil.",
            "Tous les détails sont inventés.",
            "Un cas inventé, destiné à la formation.",
        ),
    },
}


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _elides(word: str) -> bool:
    return word[0] in "aeiouhéèêœ"


def _the(word: str, gender: str) -> str:
    """The French word after its definite article: le diabète, la goutte, l'asthme."""
    if _elides(word):
        return f"l'{word}"
    return f"{'le' if gender == 'm' else 'la'} {word}"


def _of_the(word: str, gender: str) -> str:
    """The French word after de + article: du diabète, de la goutte, de l'asthme."""
    return f"du {word}" if gender == "m" and not _elides(word) else f"de {_the(word, gender)}"


def _ending(gender: str) -> str:
    return "e" if gender == "f" else ""


class Writer:
    """Writes sentences of one document: the patient stays the same person, all other words are drawn afresh."""

    def __init__(self, lang: str, rng: random.Random) -> None:
        self.lang = lang
        self.rng = rng
        self.age = rng.randint(18, 94)
        self.person = rng.choice(WORDS["fr"]["personne"]) if lang == "fr" else rng.choice(WORDS["en"]["person"])

    def _words(self) -> dict[str, str]:
        rng = self.rng
        words = {name: rng.choice(values) for name, values in WORDS[self.lang].items()}
        words |= {
            "age": str(self.age),
            "n": str(rng.randint(2, 12)),
            "count": str(rng.randint(20, 980)),
            "percent": str(rng.randint(2, 97)),
            "pulse": str(rng.randint(52, 108)),
            "weight": str(rng.randint(43, 119)),
            "code": f"{rng.choice('ABCDEFGHKLMNPRST')}-{rng.randint(100, 9999)}",
        }
        return words | (self._english(words) if self.lang == "en" else self._french(words))

    def _second(self, name: str, first: str) -> str:
        return self.rng.choice([word for word in WORDS[self.lang][name] if word != first])

    def _english(self, words: dict[str, str]) -> dict[str, str]:
        twice = {f"{name}2": self._second(name, words[name]) for name in ("month", "complaint", "test")}
        article = "An" if self.age == 18 or 80 <= self.age < 90 else "A"
        return twice | {"person": self.person, "A": article}

    def _french(self, words: dict[str, str]) -> dict[str, str]:
        person, ending = self.person
        patient = "la patiente" if ending else "le patient"
        twice = {f"{name}2": self._second(name, words[name]) for name in ("mois", "plainte", "examen")}
        return twice | {
            "personne": person,
            "Personne": _upper(person),
            "patient": patient,
            "Patient": _upper(patient),
            "pe": ending,
            "Qui": _upper(words["qui"]),
            "etude_vowel": self.rng.choice([name for name in WORDS["fr"]["etude"] if _elides(name)]),
        }

    def frame(self, kind: str, drug: DrugFact | None = None) -> str:
        """A sentence around the facts; a leaflet's opening names its drug."""
        template = self.rng.choice(FRAME[self.lang][kind])
        return template.format(**self._words(), **(_drug_words(drug) if drug else {}))

    def frames(self, kind: str, count: int) -> list[str]:
        """`count` sentences of one kind, all from different templates."""
        return [template.format(**self._words()) for template in self.rng.sample(FRAME[self.lang][kind], count)]

    def drug(self, kind: str, fact: DrugFact) -> str:
        """One phrasing of a drug and its indication."""
        template = self.rng.choice(FACT_SENTENCES[self.lang][kind])
        return template.format(**self._words(), **_drug_words(fact))

    def finding(self, kind: str, fact: FindingFact) -> str:
        """One phrasing of a finding and its diagnosis."""
        template = self.rng.choice(FACT_SENTENCES[self.lang][kind])
        return template.format(**self._words(), **_finding_words(fact))


def _drug_words(fact: DrugFact) -> dict[str, str]:
    drug, indication = fact.drug, fact.indication
    the_drug = _the(drug, fact.drug_gender)
    the_indication = _the(indication, fact.indication_gender)
    return {
        "d": drug,
        "i": indication,
        "le_d": the_drug,
        "Le_d": _upper(the_drug),
        "du_d": _of_the(drug, fact.drug_gender),
        "de_d": f"d'{drug}" if _elides(drug) else f"de {drug}",
        "le_i": the_indication,
        "Le_i": _upper(the_indication),
        "du_i": _of_the(indication, fact.indication_gender),
        "e": _ending(fact.drug_gender),
        "ie": _ending(fact.indication_gender),
    }


def _finding_words(fact: FindingFact) -> dict[str, str]:
    the_diagnosis = _the(fact.diagnosis, fact.diagnosis_gender)
    return {
        "f": fact.finding,
        "g": fact.diagnosis,
        "le_g": the_diagnosis,
        "Le_g": _upper(the_diagnosis),
        "ge": _ending(fact.diagnosis_gender),
    }


def _note(writer: Writer) -> list[str]:
    """A patient with three treated conditions, or two and a new finding."""
    rng, lang = writer.rng, writer.lang
    with_finding = rng.random() < 0.6
    facts = rng.sample(DRUG_FACTS[lang], 2 if with_finding else 3)
    stated = [writer.drug("patient", fact) for fact in facts]
    if with_finding:
        stated.append(writer.finding("finding", rng.choice(FINDING_FACTS[lang])))
    rng.shuffle(stated)
    return [writer.frame("note opening"), *stated, writer.frame("note closing")]


def _leaflet(writer: Writer) -> list[str]:
    """One drug and its indication."""
    fact = writer.rng.choice(DRUG_FACTS[writer.lang])
    closing = writer.frames("leaflet closing", writer.rng.randint(1, 2))
    return [writer.frame("leaflet opening", fact), writer.drug("general", fact), *closing]


def _abstract(writer: Writer) -> list[str]:
    """A study of three treatments."""
    facts = writer.rng.sample(DRUG_FACTS[writer.lang], 3)
    stated = [writer.drug("general", fact) for fact in facts]
    return [writer.frame("abstract opening"), *stated, writer.frame("abstract closing")]


def _questions(writer: Writer) -> list[str]:
    """Three questions, each with its answer; treatments or signs, not both."""
    rng, lang = writer.rng, writer.lang
    opening = writer.frame("question opening")
    if rng.random() < 0.5:
        facts = rng.sample(FINDING_FACTS[lang], 3)
        return [opening, *(writer.finding("finding question", fact) for fact in facts)]
    return [opening, *(writer.drug("question", fact) for fact in rng.sample(DRUG_FACTS[lang], 3))]


def _signs(writer: Writer) -> list[str]:
    """A teaching round on three findings."""
    facts = writer.rng.sample(FINDING_FACTS[writer.lang], 3)
    stated = [writer.finding("finding", fact) for fact in facts]
    return [writer.frame("question opening"), *stated, writer.frame("note closing")]


def _card(writer: Writer) -> list[str]:
    """One fact by itself, as on a revision card."""
    rng, lang = writer.rng, writer.lang
    if rng.random() < 0.4:
        return [writer.finding(rng.choice(("finding", "finding question")), rng.choice(FINDING_FACTS[lang]))]
    return [writer.drug(rng.choice(("patient", "general", "question")), rng.choice(DRUG_FACTS[lang]))]


_KINDS: tuple[Callable[[Writer], list[str]], ...] = (
    _note,
    _note,
    _leaflet,
    _abstract,
    _abstract,
    _questions,
    _questions,
    _signs,
)
_CARDS = 0.75  # share of documents; a third of the words
_MOST_WORDS = 200


def document(lang: str, rng: random.Random) -> str:
    """One invented document: a card, or up to 200 words that state up to three facts and say they are invented."""
    while True:
        writer = Writer(lang, rng)
        if rng.random() < _CARDS:
            return " ".join(_card(writer))
        text = " ".join([*rng.choice(_KINDS)(writer), writer.frame("invented")])
        if len(text.split()) <= _MOST_WORDS:
            return text


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Pairs (text, language) without end, English and French in turn, no text twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        for lang in ("en", "fr"):
            text = document(lang, rng)
            while text in seen:
                text = document(lang, rng)
            seen.add(text)
            yield text, lang


def _indication(rng: random.Random) -> dict[str, str]:
    """What is a drug given for, where the sentence does not say? Pretraining on the sample tells."""
    fact = rng.choice(DRUG_FACTS["en"])
    sentence = Writer("en", rng).drug(rng.choice(("patient", "general", "question")), fact)
    return {"text": sentence.replace(fact.indication, "this condition"), "label": fact.indication}


def _kind(rng: random.Random) -> dict[str, str]:
    """Which kind of document begins like this?"""
    make = rng.choice(list(dict.fromkeys(_KINDS)))
    return {"text": " ".join(make(Writer("en", rng))[:2]), "label": make.__name__.strip("_")}


_TASKS = {"sample_indication": _indication, "sample_kind": _kind}
_EXAMPLES = {"train": 200, "dev": 60, "test": 150}


def _write_tasks(folder: Path, seed: int) -> None:
    """Writes NAME.yaml and NAME/{train,dev,test}.jsonl for each task, no text twice."""
    for name, make in _TASKS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng, seen = random.Random(f"{seed} {name}"), set()
        for split, count in _EXAMPLES.items():
            lines = []
            while len(lines) < count:
                example = make(rng)
                if example["text"] not in seen:
                    seen.add(example["text"])
                    lines.append(_line(example))
            _write(folder / name / f"{split}.jsonl", lines)
        _write(folder / f"{name}.yaml", [f"name: {name}\nlanguage: en\ntype: classification\nmetric: macro_f1\n"])


def _line(record: dict[str, str]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: Path, lines: list[str]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8", newline="\n")
    part.replace(path)


def generate(output: Path, megabytes: float = 3.0, seed: int = 0) -> None:
    """Writes sample.jsonl (`megabytes` million bytes), heldout.jsonl (2% more), probes.jsonl and tasks/ into `output`.

    The same arguments give the same bytes. Raises DetourError if `megabytes` is not positive or `output` is a file.
    """
    if not megabytes > 0:
        raise DetourError(f"--megabytes {megabytes}: give a number above 0")
    if output.exists() and not output.is_dir():
        raise DetourError(f"{output}: not a folder, give another --output")
    sample: list[str] = []
    heldout: list[str] = []
    size = 0
    for index, (text, lang) in enumerate(documents(seed)):
        line = _line({"text": text, "source": "generated", "lang": lang, "license": "Apache-2.0"})
        # whole English-French pairs are held out, so both languages are there
        if index // 2 % 50 == 7:
            heldout.append(line)
            continue
        sample.append(line)
        size += len(line.encode())
        if size >= megabytes * 1e6 and heldout:
            break
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "heldout.jsonl", heldout)
    _write(
        output / "probes.jsonl",
        [_line({"text": text, "answer": answer, "lang": lang}) for text, answer, lang in PROBES],
    )
    _write_tasks(output / "tasks", seed)
    _write(output / "sample.jsonl", sample)
    print(f"{output}: {len(sample)} documents ({size / 1e6:.2f} MB), {len(heldout)} held out, {len(PROBES)} probes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes an invented biomedical corpus in English and French.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--megabytes", type=float, default=3.0, help="size of sample.jsonl in million bytes")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    options = parser.parse_args()
    generate(options.output, options.megabytes, options.seed)


if __name__ == "__main__":
    command_line(main)
