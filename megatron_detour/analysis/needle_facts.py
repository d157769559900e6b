"""Made-up medical facts in French and English: templates with two to four slots, and the values that fill them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SLOT = re.compile(r"\{(\w+)\}")

TEMPLATES = {
    "en": (
        "Patient {name} received {dose} mg of {drug} on {day}.",
        "The biopsy of the {organ} was filed under {code}.",
        "Nurse {name} noticed a {color} mark on the {site}.",
        "The allergy to {substance} was first confirmed in {city}.",
        "The {device} in room {room} was repaired by {name}.",
        "The operation on the {organ} lasted {minutes} minutes under {drug}.",
        "Vial {code} held {count} units of {product}.",
        "Doctor {name} enrolled {count} people with {disease} in {city}.",
    ),
    "fr": (
        "Le patient {name} a reçu {dose} mg de {drug} {day}.",
        "La biopsie {organ} a été classée sous le numéro {code}.",
        "L'infirmière {name} a remarqué une tache {color} sur {site}.",
        "L'allergie {substance} a d'abord été confirmée à {city}.",
        "{device} de la chambre {room} a été réparé par {name}.",
        "L'opération {organ} a duré {minutes} minutes sous {drug}.",
        "Le flacon {code} contenait {count} unités de {product}.",
        "Le docteur {name} a recruté {count} personnes atteintes {disease} à {city}.",
    ),
}
_NUMBERS = {
    "dose": ("15", "35", "60", "85", "120", "175", "240", "650"),
    "room": ("12", "27", "38", "104", "219", "305", "416", "523"),
    "minutes": ("25", "40", "55", "70", "95", "130", "165", "210"),
    "count": ("14", "31", "46", "73", "88", "152", "267", "390"),
    "code": ("AK-417", "BR-902", "DX-358", "FT-671", "HL-240", "NV-583", "QS-196", "ZW-734"),
}
LEXICONS = {
    "en": _NUMBERS
    | {
        "name": ("Abbott", "Calder", "Dunmore", "Fairley", "Hargrove", "Lindqvist", "Okafor", "Pemberton"),
        "drug": ("metformin", "warfarin", "ketamine", "digoxin", "tramadol", "ramipril", "propofol", "furosemide"),
        "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "organ": ("liver", "kidney", "spleen", "thyroid", "bladder", "pancreas", "colon", "left lung"),
        "color": ("red", "yellow", "brown", "gray", "purple", "white", "green", "dark blue"),
        "site": ("left ankle", "right wrist", "neck", "lower back", "left thumb", "right knee", "forehead", "chest"),
        "substance": ("latex", "nickel", "iodine", "penicillin", "soy", "peanuts", "pollen", "shellfish"),
        "city": ("Bergen", "Cordoba", "Dunedin", "Gdansk", "Halifax", "Kyoto", "Mombasa", "Tampere"),
        "device": ("ventilator", "monitor", "infusion pump", "scale", "lamp", "bed", "defibrillator", "door"),
        "product": ("insulin", "heparin", "plasma", "saline", "albumin", "oxytocin", "vaccine", "serum"),
        "disease": ("gout", "malaria", "asthma", "psoriasis", "lupus", "anemia", "scurvy", "measles"),
    },
    "fr": _NUMBERS
    | {
        "name": ("Barbier", "Chauvet", "Delorme", "Fontanel", "Guillemot", "Lacroix", "Rousselin", "Vasseur"),
        "drug": ("metformine", "warfarine", "kétamine", "digoxine", "tramadol", "ramipril", "propofol", "furosémide"),
        "day": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
        "organ": (
            "du foie",
            "du rein",
            "de la rate",
            "de la thyroïde",
            "de la vessie",
            "du côlon",
            "du sein",
            "du nez",
        ),
        "color": ("rouge", "jaune", "brune", "grise", "violette", "blanche", "verte", "rose"),
        "site": (
            *("la cheville gauche", "le poignet droit", "la nuque", "le bas du dos"),
            *("le pouce gauche", "le genou droit", "le front", "la joue gauche"),
        ),
        "substance": (
            *("au latex", "au nickel", "à l'iode", "à la pénicilline"),
            *("au soja", "aux arachides", "au pollen", "aux crustacés"),
        ),
        "city": ("Angers", "Besançon", "Calais", "Dijon", "Limoges", "Nîmes", "Pau", "Valence"),
        "device": (
            *("Le respirateur", "Le moniteur", "Le brancard", "Le fauteuil"),
            *("Le lit", "Le défibrillateur", "Le téléphone", "Le volet"),
        ),
        "product": ("plasma", "sérum", "vaccin", "glucose", "cortisone", "morphine", "fer", "potassium"),
        "disease": (
            *("de la goutte", "du paludisme", "de la rougeole", "de psoriasis"),
            *("du scorbut", "de la grippe", "de la lèpre", "du tétanos"),
        ),
    },
}


@dataclass(frozen=True)
class Fact:
    """A template's number and the values of its slots, in their order."""

    language: str
    template: int
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        values = iter(self.values)
        return SLOT.sub(lambda _: next(values), TEMPLATES[self.language][self.template])


def slots_of(language: str, template: int) -> list[str]:
    return SLOT.findall(TEMPLATES[language][template])


def draw_fact(language: str, rng: random.Random) -> Fact:
    template = rng.randrange(len(TEMPLATES[language]))
    lexicons = LEXICONS[language]
    return Fact(language, template, tuple(rng.choice(lexicons[slot]) for slot in slots_of(language, template)))


def other_fact(fact: Fact, rng: random.Random) -> Fact:
    """Return the same template with another value in every slot."""
    lexicons = LEXICONS[fact.language]
    slots = zip(slots_of(fact.language, fact.template), fact.values, strict=True)
    values = tuple(rng.choice([value for value in lexicons[slot] if value != own]) for slot, own in slots)
    return Fact(fact.language, fact.template, values)
