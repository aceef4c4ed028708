"""Word lists of the recognisers: titles, particles, and words that look like names."""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words of these languages, and names of diseases and tests, that are also names: only a title, a first name or the same
# name elsewhere in the text makes a name of them, and none of them is ever a surrogate.
AMBIGUOUS = _set(
    """
    abbott addison adler alt alzheimer amber angel april archer arm art arzt asia asperger august austin autumn
    babinski bach bailey baker ball banks basedow bass bauer baum becker bein bell berg berger berlin berry best
    bill binder bishop black blank bloch bob bond booth bosch bowman brady branch brand braun brent bright britt
    brooks brown bunte burger burke burns busch bush butler böhm camp carol carpenter carter case cash chambers
    chance chase chelsea china christ christian church clay cliff cody coke cole constant cook cooper craft crohn
    cross curry curtis cushing daisy dakota dale dallas dawn day dean destiny dollar down drake drew early east eden
    engel england english ernst essex eule faith farmer feld field fields fink fischer fisher flowers forbes ford
    foster fox frank franke franklin frau freitag frey friday frost fry fuchs fuß ganz garden gates geiger gene
    georgia gerber glass gold golden good grace graf grant grau graves gray green grey grimm groß gross guide gut
    guy haas hagen hahn hall hammer hand hardy harmony hart hase haupt haus hazel head heart heath heather heaven
    heck heidelberg heim heinz heller herbst hermann herr herz herzog hesse hill hirsch hodgkin hof hoffmann holiday
    holly hood hope horn house houston huber hunter huntington hurst ida ina india iris israel ivory ivy jack jade
    jan jasmin jasmine jean jersey jewel jordan joy jung june justice kai kaiser kant karin karl kaufmann keller
    kelly kent kenya kern kind king kirche klein knight koch kohl kraft krankenhaus kraus krause krug krüger kuhn
    kurz könig lake lamb lance land lane lang lange laurel law lee leicht lenz lester licht lily lina lincoln link
    linus little liver lob london long lorenz love lowe ludwig luna lung madison magdeburg mai maier major mann
    march marder marina mark marks markt marsh martin mason maurer may mayer meister melody mercedes mercy metzger
    meyer miles mill miller mills mohr montag montana moody moon moore moos morgen morris moss most mutter müller
    nadel nagel nash neu noble noll nord norden norman north oliver olive otto page paige paris park parker
    parkinson parks parsons patience patient paul pause payne pearl penny pfeiffer phoenix pierce piper pohl poole
    pope porter post potter powell power powers pratt preis presley price prince princess prinz queen rabe ramsey
    randy ray reed reese reich reis reuter rice rich richter rinne ritter river rivers roach rob robin rock rod
    roman root rosa rose roth ruby rush russell rusty sage salem sand sanders sandy sauer savage savannah schilling
    schlange schlegel schmid schneider scholz schreiber schröder schubert schulz schuster schwarz scott sharp
    shepherd short sie sierra silver simon sky skye small snow sommer sonne sonnenschein sonntag spang sparks spears
    spence spencer spring stanley stark steele stein sterling stern steuer stewart stone storm strong stuart sturm sue
    summer summers sun sweet sydney taylor teil temple terry thiel tiger tisch toll trinity troy turner tyler
    underwood unger urban van vera victor violet virginia vogel vogt voigt von wagner walker wall walter ward warner
    washington waters watson watts wayne weber wechsler weeks wein weiss weiß wells wesley west white wild wilhelm
    will wills wilson win wind winter winters wirth wise wolf wolff wood woods worth wulff young zahn ziegler zimmer
    zimmermann
    """
)

# Behind these, a word with a capital is taken for a name.
TITLES = _set(
    """
    sincerely gruß grüße grüßen yours anwalt anwältin arzt assistenzarzt assistenzärztin attending bruder brother
    chefarzt chefärztin consultant dame daughter dear doctor doktor dr drs ehefrau ehemann facharzt fachärztin
    father frau fräulein fr gez hausarzt hausärztin herr herrn hr husband klägerin kläger kunde kundin liebe lieber
    madam mandant mandantin miss mister mother mr mrs ms mutter name nurse oberarzt oberärztin pat patient patientin
    pfleger pflegerin physician prof professor rechtsanwalt rechtsanwältin regards richter richterin schwester
    signed sir sister sohn son surgeon therapist tochter unterschrift vater wife zeuge zeugin ärztin
    """
)

# Those behind which it is one, also where nouns have capitals.
STRONG_TITLES = _set(
    "sincerely gruß grüße grüßen regards yours herr herrn frau fräulein mr mrs ms miss mister dame hr gez dr prof"
)

# Inside a last name.
PARTICLES = _set("von vom van de der den del della di da du la le zu zur ten ter al el bin ibn")

# Never a name.
NO_NAMES = _set(
    """
    der die das den dem des ein eine und oder mit ohne bei nach von vom zum zur am im in an auf aus seit ist war hat
    wird the a and or with without at after from is was has will he she it they his her this that these those no not
    on to january february march april may june july august september october november december januar februar märz
    mai juni juli oktober dezember monday tuesday wednesday thursday friday saturday sunday montag dienstag mittwoch
    donnerstag freitag samstag sonntag med dipl ing phd md rn mba er sie es wir ihr ich bitte termin alter
    geburtsdatum adresse anschrift telefon email mail fax date birth dob address phone mrn id geb geboren wohnhaft
    tel diagnose anamnese befund therapie medikation patient patientin doctor nurse hospital clinic department unit
    klinik klinikum station praxis krankenhaus abteilung universität university sir madam sehr geehrte geehrter
    damen herren dear team mobil kontakt ihr ihre ihrem ihren mein meine kein keine contact record number nummer
    insurance versicherung presents presented reports denies states berichtet klagt
    """
)

# Words of an address that say nothing of where it is.
ADDRESS_FRAME = _set(
    """
    a alley allee allees am an apartment apt auf ave avenue bei blvd boulevard box chaussee circle close court
    crescent ct damm dem den der dr drive east flat floor gardens gasse grove highway hill hinter hwy im in lane ln
    mews n north o ob p parkway pkwy pl place platz plaza po postfach rd ring road row s south sq square st ste str
    strasse straße street suite terrace trail ufer unit unter vor w walk way weg west zum zur
    """
)

# Of made-up words.
SYLLABLES = tuple(
    sorted(
        _set(
            "ba be bo da de do fa fe fo ga ge go ka ke ko la le lo ma me mo na ne no pa pe po ra re ro sa se so ta "
            "te to va ve vo"
        )
    )
)
